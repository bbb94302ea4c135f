# SPDX-License-Identifier: GPL-2.0-only
"""Scenario "fragmented": who gets known-zero pages, over the degree of fragmentation.

Each repetition is a seed, and each case of a repetition a fresh guest: fragmented by the recipe
of `fragment`, then asked for `size` bytes in single pages, then for as much in 2 MiB pages. The
first request is one of two workloads:

* ``populate``: one program populates 4 KiB pages, as the cover letter's does. All want zeros.
* ``mixed``: in bursts of 1 to 32 pages, a half by such a program, a quarter by a page cache and
  a quarter by the kernel, neither of which wants zeros.

What is recorded are shares and counts, which do not depend on the machine, and the time of the
first request, which does. Where a guest was given memory as known to be zero, the program's
memory is read back: it must be zero.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from hostzero.bench.arms import features
from hostzero.bench.fragment import (
    KernelPages,
    SmallPages,
    bursts,
    fragment,
    free_huge_pages,
    unusable_share,
)
from hostzero.bench.names import Arm, Scenario
from hostzero.errors import VmBug
from hostzero.machine import Machine
from hostzero.mm import MmConfig
from hostzero.mm.mmap import MADV_POPULATE_WRITE
from hostzero.mm.mmzone import HPAGE_PMD_ORDER
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.bench.context import Context

WORKLOADS: Final = ("populate", "mixed")
PLACEMENTS: Final[tuple[Literal["linux", "zero-aware"], ...]] = ("linux", "zero-aware")
REPORTING_ORDERS: Final = (9, 5)
COVERED: Final = (0.0, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4)


class Case(NamedTuple):
    """One cell of the scenario."""

    workload: str
    placement: Literal["linux", "zero-aware"]
    reporting_order: int
    covered: float


CASES: Final = tuple(
    Case(workload, placement, order, covered)
    for workload in WORKLOADS
    for order in REPORTING_ORDERS
    for covered in COVERED
    for placement in PLACEMENTS
)


class FragmentedScenario:
    """All cases, one repetition after the other."""

    def __init__(self, context: Context) -> None:
        """Take what the run shares."""
        self._context = context

    def run(self) -> None:
        """Measure every case with every seed.

        Raises:
            VmBug: a page was handed out as zero and is not.
        """
        options, progress = self._context.options, self._context.progress
        progress.scenario(str(Scenario.FRAGMENTED), len(CASES) * options.repetitions)
        for repetition in range(1, options.repetitions + 1):
            for case in CASES:
                values = self._measure(case, repetition)
                self._context.results.counts_for(Scenario.FRAGMENTED, case._asdict()).add(values)
                progress.step(
                    f"{case.workload}, {case.placement}, order {case.reporting_order}, "
                    f"{case.covered:.0%} covered, {repetition} of {options.repetitions}"
                )

    def _measure(self, case: Case, repetition: int) -> dict[str, float | None]:
        # The same seed for both placements, orders and workloads: they meet the same requests.
        rng = random.Random(f"{self._context.options.seed} {repetition} {case.covered}")
        with self._context.host_memory() as ram:
            offered = features(Scenario.FRAGMENTED, Arm.OPTIMIZED)
            config = MmConfig(debug_vm=False, placement=case.placement)
            with Machine(ram=ram, features=offered, mm=config) as machine:
                machine.mm.page_reporting.order = case.reporting_order
                fragment(machine, case.covered, rng)
                return _Guest(machine, self._context, case, rng).ask()


class _Guest:
    """A fragmented guest, and what it answers."""

    def __init__(self, machine: Machine, context: Context, case: Case, rng: random.Random) -> None:
        self._machine, self._context, self._case, self._rng = machine, context, case, rng
        self._size = context.options.size

    def ask(self) -> dict[str, float | None]:
        vm = self._machine.mm.mem.vm[0]
        values: dict[str, float | None] = {
            "unusable": unusable_share(self._machine),
            "free_2m_before": free_huge_pages(self._machine),
        }
        claims, steals = int(vm.fallback_claims), int(vm.fallback_steals)
        before = vm.zero_allocs.copy(), vm.known_zero_allocs.copy()
        with ExitStack() as holders:
            self._small_pages(holders, values)
            values |= _known_zero("order0", self._machine, before, 0)
            values["fallback_claims"] = int(vm.fallback_claims) - claims
            values["fallback_steals"] = int(vm.fallback_steals) - steals
            values["free_2m_held"] = free_huge_pages(self._machine)
            before = vm.zero_allocs.copy(), vm.known_zero_allocs.copy()
            fallbacks = int(vm.thp_fault_fallback)
            with self._machine.spawn() as process:
                address = process.mmap(self._size)
                process.madvise(address, self._size, MADV_POPULATE_WRITE)
                self._must_be_zero(process.find_nonzero(address, self._size))
            values |= _known_zero("order9", self._machine, before, HPAGE_PMD_ORDER)
            values["thp_fallbacks"] = int(vm.thp_fault_fallback) - fallbacks
        self._machine.mm.drain_all_pages()
        values["free_2m_after"] = free_huge_pages(self._machine)
        return values

    def _small_pages(self, holders: ExitStack, values: dict[str, float | None]) -> None:
        pages = self._size // PAGE_SIZE
        program = holders.enter_context(SmallPages(self._machine, self._size, zeros=True))
        if self._case.workload == "populate":
            with self._context.counters.measure() as stretch:
                program.populate(pages)
        else:
            cache = holders.enter_context(SmallPages(self._machine, self._size, zeros=False))
            kernel = KernelPages(self._machine)
            holders.callback(kernel.free)
            takers = {"program": program.populate, "cache": cache.populate, "kernel": kernel.take}
            asked = list(bursts(pages, self._rng))
            with self._context.counters.measure() as stretch:
                for who, burst in asked:
                    takers[who](burst)
        values["task_clock_ms"] = stretch.sample.task_clock_ms
        self._must_be_zero(program.first_nonzero())

    def _must_be_zero(self, found: int | None) -> None:
        if found is not None:
            raise VmBug(f"{Scenario.FRAGMENTED}/{self._case}: address {found:#x} does not read as zero")


def _known_zero(
    name: str, machine: Machine, before: tuple[object, object], order: int
) -> dict[str, float | None]:
    vm = machine.mm.mem.vm[0]
    asked = int(vm.zero_allocs[order]) - int(before[0][order])  # type: ignore[index]
    known = int(vm.known_zero_allocs[order]) - int(before[1][order])  # type: ignore[index]
    return {
        f"{name}_asked": asked,
        f"{name}_known": known,
        f"{name}_share": known / asked if asked else None,
    }
