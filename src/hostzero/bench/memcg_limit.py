# SPDX-License-Identifier: GPL-2.0-only
"""Scenario "memcg-limit": how much is zeroed in vain when a memory cgroup is at its limit.

The cover letter's second open question: with `__GFP_ZERO` the folio is zeroed before it is
charged. If the charge fails, the zeroing was in vain, and the fault tries a smaller folio. The
scenario counts these bytes, with the allocator zeroing (the series) and with the fault handler
zeroing after the charge (Linux 7.2 without it), in two patterns:

* ``one-process``: a process in a cgroup limited to `size` populates twice that, until it is
  refused. The limit is met once.
* ``sparse``: a process in a cgroup that has less than 2 MiB left touches one page in each of
  `size` / 2 MiB huge-page ranges, as a heap with many arenas does. Each fault tries a 2 MiB
  folio first; the limit is met at each.

Both with memory that the guest must zero (``baseline``: bits 6 and 7 off) and with memory that
it knows to be zero (``optimized``), which costs nothing to try.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from hostzero.bench.arms import features
from hostzero.bench.names import Arm, Scenario
from hostzero.errors import OutOfMemory
from hostzero.machine import Machine
from hostzero.mm import MmConfig
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MADV_POPULATE_WRITE
from hostzero.units import PAGE_SIZE, PMD_SIZE

if TYPE_CHECKING:
    from hostzero.bench.context import Context
    from hostzero.mm.mmap import Process

PATTERNS: Final = ("one-process", "sparse")
ZEROING: Final[tuple[Literal["allocator", "caller"], ...]] = ("allocator", "caller")
ARMS: Final = (Arm.BASELINE, Arm.OPTIMIZED)


class Case(NamedTuple):
    """One cell of the scenario."""

    pattern: str
    arm: Arm
    zeroing: Literal["allocator", "caller"]


CASES: Final = tuple(
    Case(pattern, arm, zeroing) for pattern in PATTERNS for arm in ARMS for zeroing in ZEROING
)


class MemcgLimitScenario:
    """All cases, one repetition after the other."""

    def __init__(self, context: Context) -> None:
        """Take what the run shares."""
        self._context = context

    def run(self) -> None:
        """Measure every case."""
        options, progress = self._context.options, self._context.progress
        progress.scenario(str(Scenario.MEMCG_LIMIT), len(CASES) * options.repetitions)
        for repetition in range(1, options.repetitions + 1):
            for case in CASES:
                values = self._measure(case)
                labels = {"pattern": case.pattern, "arm": str(case.arm), "zeroing": case.zeroing}
                self._context.results.counts_for(Scenario.MEMCG_LIMIT, labels).add(values)
                progress.step(
                    f"{case.pattern}, {case.arm}, {case.zeroing}, {repetition} of {options.repetitions}"
                )

    def _measure(self, case: Case) -> dict[str, float | None]:
        size = self._context.options.size
        offered = features(Scenario.MEMCG_LIMIT, case.arm)
        config = MmConfig(debug_vm=False, user_zeroing=case.zeroing)
        with (
            self._context.host_memory() as ram,
            Machine(ram=ram, features=offered, mm=config) as machine,
            machine.spawn() as process,
        ):
            machine.flush()
            # The sparse process fills its cgroup to one page below the last 2 MiB with small pages.
            room = size if case.pattern == "one-process" else size + PMD_SIZE - PAGE_SIZE
            process.memcg = machine.mm.memcg.create(room)
            if case.pattern == "sparse":
                full = process.mmap(size)
                process.madvise(full, size, MADV_NOHUGEPAGE)
                process.madvise(full, size, MADV_POPULATE_WRITE)
            address = process.mmap(2 * size)
            vm = machine.mm.mem.vm[0]
            before = {name: int(vm[name]) for name in _COUNTERS.values()}
            rss = process.rss
            with self._context.counters.measure() as stretch:
                refused = (
                    _one_process(process, address, 2 * size)
                    if room == size
                    else _sparse(process, address, size)
                )
            values: dict[str, float | None] = {
                name: int(vm[counter]) - before[counter] for name, counter in _COUNTERS.items()
            }
            return values | {
                "got_bytes": process.rss - rss,
                "refused": refused,
                "task_clock_ms": stretch.sample.task_clock_ms,
            }


_COUNTERS: Final = {
    "zeroed_in_vain_bytes": "zeroed_in_vain_bytes",
    "guest_zeroed_bytes": "zeroed_bytes",
    "known_zero_bytes": "known_zero_bytes",
    "failed_charges": "memcg_charge_fail",
    "faults": "pgfault",
}


def _one_process(process: Process, address: int, size: int) -> int:
    try:
        process.madvise(address, size, MADV_POPULATE_WRITE)
    except OutOfMemory:
        return 1
    return 0


def _sparse(process: Process, address: int, size: int) -> int:
    refused = 0
    for at in range(address, address + size, PMD_SIZE):
        try:
            process.madvise(at, PAGE_SIZE, MADV_POPULATE_WRITE)
        except OutOfMemory:
            refused += 1
    return refused
