# SPDX-License-Identifier: GPL-2.0-only
"""What a phase begins with: free memory dirty, and with the host if the arm gives it away."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hostzero.bench.arms import ARMS, gives_memory_away
from hostzero.bench.guest import DIRT, PreparedGuest
from hostzero.bench.names import TIMED, Arm, Scenario
from hostzero.bench.options import LEAST_TO_REPORT, RESERVE_SHARE
from hostzero.mm.verify import verify_memory
from hostzero.ram import Ram, open_ram

pytestmark = pytest.mark.compiled_only  # writes and counts all of a guest, cell by cell

MIB = 1 << 20
MEMORY = 80 * MIB
SIZE = 16 * MIB
TABLES = MIB
GIVING = [arm for arm in ARMS if gives_memory_away(arm)]


@pytest.fixture
def ram() -> Iterator[Ram]:
    with open_ram(MEMORY) as ram:
        yield ram


def dirty_bytes(ram: Ram) -> int:
    return int(np.count_nonzero(ram.array(np.uint8) == DIRT))


@pytest.mark.parametrize("scenario", TIMED)
@pytest.mark.parametrize("arm", ARMS)
def test_all_memory_is_free_and_nothing_is_mapped(ram: Ram, scenario: Scenario, arm: Arm) -> None:
    with PreparedGuest(ram, scenario, arm, SIZE) as guest:
        stats = guest.machine.stats()
        assert stats.free > MEMORY - MIB
        assert stats.balloon == 0
        verify_memory(guest.machine.mm.mem)


@pytest.mark.parametrize("scenario", TIMED)
def test_a_guest_that_gives_nothing_away_stays_dirty(ram: Ram, scenario: Scenario) -> None:
    with PreparedGuest(ram, scenario, Arm.NEVER_REPORTED, SIZE) as guest:
        assert guest.returned == 0
        assert guest.machine.stats().host_discarded == 0
        assert ram.resident() >= MEMORY - MEMORY // RESERVE_SHARE
        # All that was written to, but for what page tables have overwritten since.
        assert dirty_bytes(ram) >= MEMORY - MEMORY // RESERVE_SHARE - 3 * MIB
        guest.give_away()
        assert guest.machine.stats().host_discarded == 0


@pytest.mark.parametrize("arm", GIVING)
@pytest.mark.parametrize("scenario", [Scenario.THP, Scenario.SMALL_PAGES])
def test_reported_memory_is_with_the_host(ram: Ram, scenario: Scenario, arm: Arm) -> None:
    with PreparedGuest(ram, scenario, arm, SIZE) as guest:
        assert guest.returned >= MEMORY - MEMORY // RESERVE_SHARE - 8 * MIB  # parked pages stay
        assert guest.machine.stats().host_discarded >= guest.returned
        assert ram.resident() <= MEMORY - guest.returned
        assert dirty_bytes(ram) <= MEMORY - guest.returned


@pytest.mark.parametrize("arm", GIVING)
def test_the_balloon_was_with_the_host(ram: Ram, arm: Arm) -> None:
    with PreparedGuest(ram, Scenario.BALLOON, arm, SIZE) as guest:
        assert SIZE <= guest.returned <= guest.machine.stats().host_discarded < SIZE + 32 * MIB
        # The rest is as dirty as before: only the balloon gives away here.
        assert dirty_bytes(ram) >= MEMORY // 2 - 8 * MIB


@pytest.mark.parametrize("scenario", TIMED)
@pytest.mark.parametrize("arm", ARMS)
def test_populating_zeroes_what_the_arm_does_not_know(ram: Ram, scenario: Scenario, arm: Arm) -> None:
    with PreparedGuest(ram, scenario, arm, SIZE) as guest:
        before, huge_before = guest.machine.stats(), guest.machine.mm.vm_stats().thp_fault_alloc
        address = guest.map()
        if scenario is not Scenario.HUGETLB_RESERVED:  # which allocates at mmap
            assert guest.machine.stats() == before
        guest.populate(address)
        after, huge = guest.machine.stats(), guest.machine.mm.vm_stats().thp_fault_alloc
        # A hugetlb page is no transparent one.
        transparent = scenario in (Scenario.THP, Scenario.BALLOON)
        assert huge - huge_before == (SIZE // (2 * MIB) if transparent else 0)
        zeroed, known = after.guest_zeroed - before.guest_zeroed, after.known_zero - before.known_zero
        if arm is Arm.OPTIMIZED and scenario is not Scenario.HUGETLB_RESERVED:
            assert known >= SIZE // 2
            assert SIZE <= zeroed + known < SIZE + TABLES
        elif arm is Arm.NO_ZEROING:
            assert known < TABLES
            assert zeroed < TABLES
        else:
            # A reservation forgets what the host zeroed, whatever the arm; page tables profit still.
            assert known == 0 or (arm is Arm.OPTIMIZED and known < TABLES)
            assert SIZE <= zeroed < SIZE + TABLES
        if arm is not Arm.NO_ZEROING:
            assert guest.first_nonzero(address) is None


def test_a_guest_that_never_zeroes_shows_its_dirt(ram: Ram) -> None:
    """With nothing given away, as a host without memory to spare would have it."""
    with PreparedGuest(ram, Scenario.THP, Arm.NO_ZEROING, SIZE) as guest:
        address = guest.map()
        guest.fill(address)
        guest.unmap(address)
        address = guest.map()
        guest.populate(address)
        assert guest.first_nonzero(address) == address


def test_an_optimized_populate_leaves_the_memory_with_the_host(ram: Ram) -> None:
    with PreparedGuest(ram, Scenario.THP, Arm.OPTIMIZED, SIZE) as guest:
        address = guest.map()
        resident = ram.resident()
        guest.populate(address)
        populated = ram.resident()
        assert populated - resident < SIZE // 2
        guest.touch(address)
        assert ram.resident() > populated
        assert guest.first_nonzero(address) == address


def test_what_was_filled_is_dirty_again_once_it_is_free(ram: Ram) -> None:
    with PreparedGuest(ram, Scenario.THP, Arm.OPTIMIZED, SIZE) as guest:
        free = guest.machine.stats().free
        address = guest.map()
        guest.fill(address)
        dirty = dirty_bytes(ram)
        assert dirty >= SIZE
        assert guest.machine.stats().free <= free - SIZE
        guest.unmap(address)
        assert guest.machine.stats().free == free
        assert dirty_bytes(ram) == dirty
        discarded = guest.machine.stats().host_discarded
        guest.give_away()
        assert guest.machine.stats().host_discarded - discarded >= SIZE // 2


def test_nothing_of_an_earlier_guest_is_left(ram: Ram) -> None:
    ram.array(np.uint8)[:] = 0x55
    with PreparedGuest(ram, Scenario.THP, Arm.NEVER_REPORTED, SIZE):
        assert np.count_nonzero(ram.array(np.uint8) == 0x55) < TABLES
        assert dirty_bytes(ram) > MEMORY // 2


def test_a_switched_off_guest_leaves_the_host_memory_open(ram: Ram) -> None:
    with PreparedGuest(ram, Scenario.THP, Arm.BASELINE, SIZE) as guest:
        assert guest.machine.device.live
    assert not guest.machine.device.live
    assert not ram.closed


@pytest.mark.parametrize(("memory", "reports"), [(LEAST_TO_REPORT, True), (64 * MIB, False)])
def test_the_smallest_guest_that_options_allow_does_report(memory: int, reports: bool) -> None:
    """Through a churn too, where parked pages are missing from what is free."""
    size = memory // 4 * 3 // (2 * MIB) * 2 * MIB
    with open_ram(memory) as ram, PreparedGuest(ram, Scenario.SMALL_PAGES, Arm.OPTIMIZED, size) as guest:
        for _ in range(3):
            before = guest.machine.stats().known_zero
            address = guest.map()
            guest.fill(address)
            guest.unmap(address)
            guest.give_away()
            assert (guest.machine.stats().known_zero - before > size // 2) == reports
