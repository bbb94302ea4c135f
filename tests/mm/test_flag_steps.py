# SPDX-License-Identifier: GPL-2.0-only
"""Every interleaving of a poison bit with the setters of free pages' flags (patch 2, mutant 46)."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import pytest

from hostzero.mm import MemoryManager
from hostzero.mm.flag_steps import (
    LOCK,
    Step,
    Task,
    TestSetPageHWPoison,
    ZoneLock,
    change_flags,
    free_pages_prepare,
    interleavings,
    locked,
    run,
)
from hostzero.mm.page_flags import PG_dirty, PG_hwpoison, PG_private, PG_reported, PG_zeroed
from tests.mm.conftest import Boot

PFN = 100
SETTERS = {
    "set zeroed": {"set_": PG_zeroed},
    "clear zeroed": {"clear": PG_zeroed},
    "set reported": {"set_": PG_reported},
    "clear reported": {"clear": PG_reported},
}


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """The smallest guest that boots."""
    return boot(4)


def outcomes(mm: MemoryManager, make: Callable[[ZoneLock], list[Task]], flags: int = 0) -> list[bool]:
    """Return for each interleaving whether the poison bit is there in the end."""

    def begin() -> list[Task]:
        mm.mem.mem_map[PFN].flags_f = flags
        return make(ZoneLock())

    return [bool(int(mm.mem.mem_map[PFN].flags_f) & PG_hwpoison) for _ in interleavings(begin)]


@pytest.mark.parametrize("setter", SETTERS, ids=str)
def test_without_the_zone_lock_one_interleaving_loses_the_poison_bit(mm: MemoryManager, setter: str) -> None:
    """The base: the bit is set between the load and the store of somebody who holds the lock."""
    kept = outcomes(
        mm,
        lambda lock: [
            locked(change_flags(mm.mem, PFN, **SETTERS[setter]), lock),
            TestSetPageHWPoison(mm.mem, PFN),
        ],
    )
    assert len(kept) == 5
    assert kept.count(False) == 1


@pytest.mark.parametrize("setter", SETTERS, ids=str)
def test_under_the_zone_lock_no_interleaving_loses_it(mm: MemoryManager, setter: str) -> None:
    """Patch 2."""
    kept = outcomes(
        mm,
        lambda lock: [
            locked(change_flags(mm.mem, PFN, **SETTERS[setter]), lock),
            locked(TestSetPageHWPoison(mm.mem, PFN), lock),
        ],
    )
    assert len(kept) >= 2
    assert all(kept)


def test_two_setters_and_a_failure_are_ordered_too(mm: MemoryManager) -> None:
    """Whoever comes first: the other flags are right as well."""

    def make(lock: ZoneLock) -> list[Task]:
        return [
            locked(change_flags(mm.mem, PFN, set_=PG_zeroed), lock),
            locked(change_flags(mm.mem, PFN, clear=PG_reported), lock),
            locked(TestSetPageHWPoison(mm.mem, PFN), lock),
        ]

    def begin() -> list[Task]:
        mm.mem.mem_map[PFN].flags_f = PG_reported
        return make(ZoneLock())

    seen = {int(mm.mem.mem_map[PFN].flags_f) for _ in interleavings(begin)}
    assert seen == {PG_zeroed | PG_hwpoison}


def test_the_free_path_clears_flags_outside_the_lock_and_stays_racy(mm: MemoryManager) -> None:
    """What the series leaves: `__free_pages_prepare` may still lose the bit, lock or no lock."""
    kept = outcomes(
        mm,
        lambda lock: [free_pages_prepare(mm.mem, PFN), locked(TestSetPageHWPoison(mm.mem, PFN), lock)],
        PG_dirty | PG_private,
    )
    assert not all(kept)
    assert any(kept)


def test_the_steps_do_what_the_free_path_does(mm: MemoryManager) -> None:
    mm.mem.mem_map[PFN].flags_f = PG_dirty | PG_private | PG_hwpoison
    assert run(free_pages_prepare(mm.mem, PFN)) == PG_dirty | PG_private | PG_hwpoison
    assert int(mm.mem.mem_map[PFN].flags_f) == PG_hwpoison


def test_the_bits_former_state_is_returned(mm: MemoryManager) -> None:
    lock = ZoneLock()
    assert run(locked(TestSetPageHWPoison(mm.mem, PFN), lock)) == 0
    assert run(locked(TestSetPageHWPoison(mm.mem, PFN), lock)) == 1
    assert not lock.held


@pytest.mark.parametrize("steps", [(1, 1), (2, 3), (3, 3)])
def test_every_interleaving_is_run_once(steps: tuple[int, int]) -> None:
    def count(number: int) -> Task:
        for _ in range(number):
            yield Step("nothing")
        return 0

    found = list(interleavings(lambda: [count(number) for number in steps]))
    assert len(found) == len(set(found)) == comb(sum(steps), steps[0])
    assert all(schedule.count(0) == steps[0] for schedule in found)


def test_waiting_for_each_other_is_a_deadlock() -> None:
    def both(first: ZoneLock, second: ZoneLock) -> Task:
        def nothing() -> Task:
            yield Step("nothing")
            return 0

        return locked(locked(nothing(), second), first)

    def make() -> list[Task]:
        one, other = ZoneLock(), ZoneLock()
        return [both(one, other), both(other, one)]

    with pytest.raises(RuntimeError, match="deadlock"):
        list(interleavings(make))


def test_a_held_lock_keeps_others_out() -> None:
    lock = ZoneLock()
    assert Step(LOCK, lock).ready
    lock.held = True
    assert not Step(LOCK, lock).ready
