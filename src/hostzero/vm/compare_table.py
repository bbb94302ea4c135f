# SPDX-License-Identifier: GPL-2.0-only
"""A comparison as tables, on a terminal or as Markdown, with what each number leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.console import Console

from hostzero.host import machine_line
from hostzero.render import NONE, new_table, print_note, print_table
from hostzero.stats import PairedRatio, summarize
from hostzero.units import format_size
from hostzero.vm.compare import Comparison, Setting
from hostzero.vm.compare_phases import RULE, ArmName, Sample
from hostzero.vm.steps import MIB

COLUMNS: Final = (
    "phase",
    "device",
    "device CPU s",
    "of it backend",
    "vCPU s",
    "all CPU s",
    "wall s",
    "MiB back",
    "n",
)
POOL_COLUMN: Final = "pool pages"
_FIRST: Final = ("phase", "device", "device CPU s", "of it backend", "MiB back", POOL_COLUMN, "n")
_SECOND: Final = ("phase", "device", "vCPU s", "all CPU s", "wall s")
RATIO_COLUMNS: Final = ("phase", "device CPU", "all CPU", "wall", "n")

NAMES: Final = {ArmName.HOSTZERO: "hostzero", ArmName.QEMU: "virtio-balloon-pci"}
NOTES: Final = (
    f"Median (smallest to largest); n and, in brackets, how many repetitions were disturbed: {RULE}.",
    (
        "device CPU: QEMU's main thread and, for hostzero, `hostzero device`. The vCPU's thread, which runs "
        "the guest and also reads and writes configuration space for it, is beside it, and all CPU has every "
        "thread of both processes."
    ),
    "MiB back: by how much the memory that the host has backed for the guest shrank in the phase.",
    (
        "A report is paced by the guest, which looks for free memory every two seconds and then reports a "
        "part of it: most of its wall time is waiting, and what QEMU's main thread uses at rest is in it."
    ),
)
POOL_NOTE: Final = (
    "pool pages: how many pages of 2 MiB another program can have from the host's pool after the phase and "
    "could not before it. hostzero's device offers MUST_TELL_HOST here; QEMU's does not have it."
)


def device_rows(setting: Setting, *, pool: bool) -> Iterator[tuple[str, ...]]:
    """Yield the rows of `COLUMNS`, two for a phase; with `pool` one cell more."""
    for phase in setting.phases():
        for arm in ArmName:
            samples = setting.of(arm, phase)
            backend = spread(samples, lambda sample: sample.backend) if arm is ArmName.HOSTZERO else NONE
            row = (
                str(phase),
                NAMES[arm],
                spread(samples, lambda sample: sample.device),
                backend,
                spread(samples, lambda sample: sample.vcpu),
                spread(samples, lambda sample: sample.everything),
                spread(samples, lambda sample: sample.wall),
                spread(samples, lambda sample: sample.given_back / MIB, digits=0),
                count(samples),
            )
            freed = spread(samples, lambda sample: sample.pool_freed or 0, digits=0)
            yield (*row, freed) if pool else row


def ratio_rows(setting: Setting) -> Iterator[tuple[str, ...]]:
    """Yield the rows of `RATIO_COLUMNS`: hostzero over QEMU, paired by repetition."""
    for phase in setting.phases():
        ratios = [
            setting.ratio(phase, lambda sample: sample.device),
            setting.ratio(phase, lambda sample: sample.everything),
            setting.ratio(phase, lambda sample: sample.wall),
        ]
        yield (str(phase), *(ratio_text(ratio) for ratio in ratios), str(ratios[0].n))


def spread(samples: Sequence[Sample], figure: Callable[[Sample], float], digits: int = 3) -> str:
    """Return a median with the smallest and the largest value, as in ``0.40 (0.38–0.44)``."""
    summary = summarize([figure(sample) for sample in samples])
    median, low, high = (
        f"{value:.{digits}f}" for value in (summary.median, summary.minimum, summary.maximum)
    )
    return median if low == high else f"{median} ({low}–{high})"


def count(samples: Sequence[Sample]) -> str:
    """Return how many repetitions there were, and how many were disturbed."""
    return f"{len(samples)} ({sum(sample.disturbed for sample in samples)})"


def ratio_text(ratio: PairedRatio) -> str:
    """Return a ratio with its 95 % interval."""
    if ratio.ratio is None:
        return NONE
    if ratio.ci95 is None:
        return f"{ratio.ratio:.2f}"
    return f"{ratio.ratio:.2f} [{ratio.ci95[0]:.2f}, {ratio.ci95[1]:.2f}]"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print every setting's two tables, and what the numbers leave out."""
    pool = comparison.plan.huge_pages
    console.print(heading(comparison), style="bold", highlight=False, soft_wrap=True)
    console.print()
    for setting in comparison.settings:
        rows = list(device_rows(setting, pool=pool))
        # All columns in one table do not fit a terminal.
        for heads, part in ((title(setting), _FIRST), ("the same repetitions", _SECOND)):
            table = new_table(*_cells(columns(pool=pool), part), left=2)
            for row in rows:
                table.add_row(*_cells(row, part))
            print_table(console, heads, table)
        ratios = new_table(*RATIO_COLUMNS)
        for row in ratio_rows(setting):
            ratios.add_row(*row)
        print_table(console, "hostzero over QEMU, paired by repetition, with its 95 % interval", ratios)
    for note in notes(pool=pool):
        print_note(console, note)


def to_markdown(comparison: Comparison, date: str) -> str:
    """Return the tables of a comparison that was made on `date`."""
    pool = comparison.plan.huge_pages
    lines = [f"Measured {date}. Machine: {machine_line(comparison.host)}. {heading(comparison)}", ""]
    for setting in comparison.settings:
        lines += [f"**{title(setting)}**", ""]
        lines += _markdown_table(columns(pool=pool), device_rows(setting, pool=pool), left=2)
        lines += ["", "hostzero over QEMU, paired by repetition, with its 95 % interval:", ""]
        lines += [*_markdown_table(RATIO_COLUMNS, ratio_rows(setting), left=1), ""]
    lines += [f"- {note}" for note in notes(pool=pool)]
    return "\n".join(lines) + "\n"


def _cells(row: Sequence[str], part: Sequence[str]) -> list[str]:
    return [cell for name, cell in zip(columns(pool=True), row, strict=False) if name in part]


def heading(comparison: Comparison) -> str:
    """Return what was compared on what, in a line."""
    plan = comparison.plan
    pages = "2 MiB huge pages (hugetlb)" if plan.huge_pages else "4 KiB pages (memfd)"
    emulated = "software emulation (TCG)" if comparison.accel == "tcg" else "KVM"
    memory = f"{format_size(plan.memory)} of memory in {pages}"
    sizes = f"Inflate and deflate: {format_size(plan.inflate)}; report: {format_size(plan.report)}"
    return f"QEMU {comparison.qemu}, {emulated}, one CPU, {memory}; guest Linux {comparison.kernel}. {sizes}."


def title(setting: Setting) -> str:
    """Return what distinguishes a setting."""
    return f"Kernel with {setting.append}" if setting.append else "Kernel as Debian starts it"


def columns(*, pool: bool) -> tuple[str, ...]:
    """Return the columns of the table of devices."""
    return (*COLUMNS, POOL_COLUMN) if pool else COLUMNS


def notes(*, pool: bool) -> tuple[str, ...]:
    """Return what the numbers leave out."""
    return (*NOTES, POOL_NOTE) if pool else NOTES


def _markdown_table(header: Sequence[str], rows: Iterator[tuple[str, ...]], left: int) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "--:|" * (len(header) - left)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
