# SPDX-License-Identifier: GPL-2.0-only
"""How `hostzero vm run` shows what happens: a table that grows, and the present moment below it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hostzero.render import new_table
from hostzero.vm.demo import Look, Phase, Run
from hostzero.vm.steps import MIB

_COLUMNS: Final = ("phase", "seconds", "backed", "balloon", "given back", "claimed zero")


def _cells(name: str, seconds: float, look: Look) -> tuple[str, ...]:
    sizes = (f"{size // MIB}" for size in (look.backed, look.actual, look.discarded, look.claimed))
    return (name, f"{seconds:.1f}", *sizes)


def phases_table(phases: list[Phase], now: tuple[str, float, Look] | None = None) -> Table:
    """Return the phases that have ended, and `now`: the one under way."""
    table = new_table(*_COLUMNS)
    for phase in phases:
        table.add_row(*_cells(phase.name, phase.seconds, phase.end))
    if now is not None:
        table.add_row(*_cells(*now), style="bold")
    return table


class LiveView:
    """Redraws the table on a terminal, whenever the run looks."""

    def __init__(self, live: Live) -> None:
        """Draw with `live`, which is running."""
        self._live = live
        self._phases: list[Phase] = []
        self._name = ""

    def begin(self, phase: str) -> None:
        """Show that a phase begins."""
        self._name = phase
        self.look(0.0, self._phases[-1].end if self._phases else Look())

    def look(self, seconds: float, look: Look) -> None:
        """Show how things stand."""
        self._live.update(phases_table(self._phases, (self._name, seconds, look)), refresh=True)

    def end(self, phase: Phase) -> None:
        """Keep the phase's row."""
        self._phases.append(phase)
        self._live.update(phases_table(self._phases), refresh=True)


class LineView:
    """One line per phase, on a console that is no terminal."""

    def __init__(self, console: Console) -> None:
        """Print on `console`."""
        self._console = console

    def begin(self, phase: str) -> None:
        """Print nothing yet."""

    def look(self, seconds: float, look: Look) -> None:
        """Print nothing."""

    def end(self, phase: Phase) -> None:
        """Print the line."""
        backed = f"{phase.end.backed // MIB} MiB backed"
        self._console.print(f"{phase.name}: {phase.seconds:.1f} s, {backed}", highlight=False, soft_wrap=True)


@contextmanager
def open_view(console: Console) -> Iterator[LiveView | LineView]:
    """Yield who shows a run on `console` while it goes on."""
    if not console.is_terminal:
        yield LineView(console)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveView(live)


def print_run(run: Run, console: Console) -> None:
    """Print what happened, as a table with notes."""
    where = f"QEMU {run.qemu}, {run.accel}; Linux {run.kernel}"
    console.print(f"{where}. Sizes in MiB.", style="bold", highlight=False, soft_wrap=True)
    console.print(phases_table(run.phases))
    console.print()
    for phase in run.phases:
        if phase.note:
            console.print(f"{phase.name}: {phase.note}", highlight=False, soft_wrap=True)
    console.print(
        f"bits offered {_bits(run.offered)}; taken by the driver {_bits(run.acked)}", highlight=False
    )


def _bits(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
