# SPDX-License-Identifier: GPL-2.0-only
"""The allocator alone: nanoseconds per block, beside the memset that it may save.

The control share is what a populate costs when nobody zeroes (an uninitialized mapping),
divided by what it costs in the baseline (memory reported, bits 6 and 7 off): the part of
the baseline that no zeroing explains. Both populates run in one guest, one after the
other, within each repetition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero import warmup
from hostzero.bench.counters import Counters
from hostzero.bench.guest import PreparedGuest
from hostzero.bench.names import Arm, Scenario
from hostzero.bench.results import AllocatorResults
from hostzero.host import describe_host
from hostzero.mm.clear_page import clear_pages_singly
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MAP_UNINITIALIZED
from hostzero.mm.page_alloc import alloc_pages_bulk
from hostzero.mm.page_free import free_pages_bulk
from hostzero.ram import open_ram

if TYPE_CHECKING:
    from hostzero.bench.progress import Progress
    from hostzero.ram import Ram

MEMORY: Final = 1 << 30
SIZE: Final = 256 << 20
_ORDER9_BLOCKS: Final = 256
_ORDER0_BLOCKS: Final = 65536
_MEMSET_PAGES: Final = 65536
_ROUNDS_ORDER9: Final = 16  # 256 blocks take a quarter of a millisecond: too short to time once


def run_allocator(repetitions: int, progress: Progress) -> AllocatorResults:
    """Measure the allocator `repetitions` times and return every value."""
    warmup.warm_up(progress.scenario, progress.step)
    columns: dict[str, list[float]] = {}
    with Counters(hardware=False) as counters, open_ram(MEMORY) as ram:
        progress.scenario("allocator", repetitions)
        _Repetition(ram, counters).run()  # unmeasured: compiled code is loaded at its first call
        for repetition in range(1, repetitions + 1):
            for name, value in _Repetition(ram, counters).run().items():
                columns.setdefault(name, []).append(value)
            progress.step(f"{repetition} of {repetitions}")
    return AllocatorResults(host=describe_host(hardware_counters=counters.hardware), **columns)


class _Repetition:
    """One fresh guest, and everything measured in it."""

    def __init__(self, ram: Ram, counters: Counters) -> None:
        self._ram = ram
        self._counters = counters

    def run(self) -> dict[str, float]:
        values: dict[str, float] = {}
        with PreparedGuest(self._ram, Scenario.THP, Arm.NEVER_REPORTED, SIZE) as guest:
            mem = guest.machine.mm.mem
            with self._counters.measure() as memset:
                # The middle of memory: written by the dirtying process, so resident.
                clear_pages_singly(mem, len(guest.machine.mm.ram_bytes) // 8192, _MEMSET_PAGES)
            values["memset_4k_ns"] = memset.sample.task_clock_ns / _MEMSET_PAGES
            for order, blocks, rounds in ((0, _ORDER0_BLOCKS, 1), (9, _ORDER9_BLOCKS, _ROUNDS_ORDER9)):
                pfns = np.zeros(blocks, dtype=np.int64)
                allocating = freeing = 0
                for _ in range(rounds):
                    with self._counters.measure() as stretch:
                        got = alloc_pages_bulk(mem, GFP_HIGHUSER_MOVABLE | GFP_COMP, order, 0, 0, pfns)
                    allocating += stretch.sample.task_clock_ns
                    with self._counters.measure() as stretch:
                        free_pages_bulk(mem, pfns[:got], order, 0)
                    freeing += stretch.sample.task_clock_ns
                    if got != blocks:
                        raise AssertionError(f"a quarter of the guest has only {got} blocks of order {order}")
                values[f"order{order}_alloc_ns"] = allocating / (blocks * rounds)
                values[f"order{order}_free_ns"] = freeing / (blocks * rounds)
        for order in (0, 9):
            values[f"control_share_order{order}"] = self._control_share(order)
        return values

    def _control_share(self, order: int) -> float:
        with PreparedGuest(self._ram, Scenario.THP, Arm.BASELINE, SIZE) as guest:
            cost = {flags: self._populate(guest, order, flags) for flags in (MAP_UNINITIALIZED, 0)}
        return cost[MAP_UNINITIALIZED] / cost[0]

    def _populate(self, guest: PreparedGuest, order: int, flags: int) -> int:
        with guest.machine.spawn() as process:
            address = process.mmap(SIZE, flags)
            if order == 0:
                process.madvise(address, SIZE, MADV_NOHUGEPAGE)
            with self._counters.measure() as stretch:
                process.madvise(address, SIZE, MADV_POPULATE_WRITE)
        return stretch.sample.task_clock_ns
