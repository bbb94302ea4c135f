# SPDX-License-Identifier: GPL-2.0-only
"""Queue numbers, ring sizes and ring pages."""

from __future__ import annotations

import itertools

import pytest

from hostzero.driver import State
from hostzero.driver.queues import find_vqs
from hostzero.errors import DriverError, OutOfMemory
from hostzero.mm.gfp import GFP_ZERO
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio import Feature, QueueRole, Segment
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import ALL_FEATURES, FakeConfig

QUEUE_BITS = (Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING)


@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=3)), ids=str)
def test_queues_are_numbered_without_gaps(make_guest: MakeGuest, on: tuple[bool, ...]) -> None:
    """All eight sets of optional queues: each works under its compacted number."""
    features = Feature.VERSION_1
    for bit, wanted in zip(QUEUE_BITS, on, strict=True):
        features |= bit if wanted else Feature(0)
    guest = make_guest(features=int(features))
    assert sorted(guest.device.rings) == list(range(2 + sum(on)))
    guest.device.set_target(3)
    assert guest.driver.num_pages == 3
    stats, _hint, reporting = on
    if reporting:
        guest.device.log.clear()
        guest.mm.page_reporting.report([(512, 9)])
        assert guest.device.log == [f"notify {1 + sum(on)}"]
    if stats:
        assert len(guest.device.of(QueueRole.STATS)) == 1


def test_a_queue_that_validation_dropped_leaves_no_gap(make_guest: MakeGuest) -> None:
    """Offered is not acknowledged: REPORTING goes with init_on_free, and its number with it."""
    features = ALL_FEATURES & ~Feature.PAGE_POISON
    guest = make_guest(features=int(features), config=FakeConfig(init_on_free=True))
    assert Feature.REPORTING not in guest.driver.features
    assert sorted(guest.device.rings) == [0, 1, 2, 3]
    assert guest.mm.page_reporting.dev is None


@pytest.mark.parametrize(
    ("role", "size", "why"),
    [
        (QueueRole.INFLATE, 0, "the inflate queue, number 0, is missing"),
        (QueueRole.REPORTING, 0, "the reporting queue, number 4, is missing"),
        (QueueRole.DEFLATE, 3, "3 entries, not a power of two"),
        (QueueRole.STATS, 100, "100 entries, not a power of two"),
        (QueueRole.STATS, -1, "-1 entries, not a power of two"),
        (QueueRole.REPORTING, 1 << 16, "65536 entries, not a power of two up to 32768"),
        (QueueRole.REPORTING, 1 << 40, "not a power of two up to 32768"),
        (QueueRole.INFLATE, 1, r"1 entries and needs 2 for one request \(-ENOSPC\)"),
        (QueueRole.FREE_PAGE, 1, r"1 entries and needs 2 for one request \(-ENOSPC\)"),
    ],
)
def test_an_impossible_queue_fails_the_probe(
    make_guest: MakeGuest, role: QueueRole, size: int, why: str
) -> None:
    """Nothing stays allocated, and the device knows that the driver gave up."""
    guest = make_guest(probe=False, sizes={role: size})
    before = guest.mm.nr_free
    with pytest.raises(DriverError, match=why):
        guest.driver.probe()
    assert guest.driver.state is State.UNBOUND
    assert guest.device.status() == 128
    guest.check_nothing_left(before)


def test_an_inflate_ring_of_one_is_enough_without_bit_7(make_guest: MakeGuest) -> None:
    features = int(ALL_FEATURES & ~Feature.DEVICE_INIT_ON_INFLATE)
    guest = make_guest(features=features, sizes={QueueRole.INFLATE: 1, QueueRole.DEFLATE: 1})
    guest.device.set_target(300)
    guest.device.set_target(0)
    assert guest.driver.num_pages == 0


def test_an_inflate_ring_of_two_is_enough_with_bit_7(make_guest: MakeGuest) -> None:
    guest = make_guest(sizes={QueueRole.INFLATE: 2})
    guest.device.set_target(600)
    assert len(guest.mm.balloon.zeroed) == 600


@pytest.mark.parametrize("size", [1, 128, 256, 1024, 4096])
def test_a_ring_is_one_zeroed_block_of_guest_pages(make_guest: MakeGuest, size: int) -> None:
    guest = make_guest(sizes={QueueRole.DEFLATE: size})
    ring = guest.device.ring(QueueRole.DEFLATE)
    assert ring.layout.size == size
    assert ring.layout.desc % PAGE_SIZE == 0
    needed = 26 * size + 12
    order = next(order for order in range(11) if PAGE_SIZE << order >= needed)
    first = ring.layout.desc // PAGE_SIZE
    assert not guest.mm.free[first : first + (1 << order)].any()
    assert all(gfp & GFP_ZERO for gfp, _ in guest.mm.alloc_log)


def test_a_huge_ring_shrinks_to_the_memory_there_is(make_guest: MakeGuest) -> None:
    """32,768 entries take a block of order 8; with only small blocks free the ring is halved."""
    guest = make_guest(probe=False, sizes={QueueRole.DEFLATE: 1 << 15})
    guest.mm.free[::8] = False
    guest.driver.probe()
    ring = guest.device.ring(QueueRole.DEFLATE)
    assert 1 <= ring.layout.size <= 512
    guest.device.set_target(40)
    guest.device.set_target(0)


def test_an_answer_to_an_abandoned_request_is_not_taken_for_another(make_guest: MakeGuest) -> None:
    """A wait that was interrupted (Ctrl-C) leaves a request behind; its length belongs to no block."""
    guest = make_guest()
    session = guest.driver._session
    assert session is not None
    queue = session.queues[QueueRole.REPORTING]
    queue.add([], [Segment(Gpa(0x200000), 0x1000)], "abandoned")
    with pytest.raises(DriverError, match="an answer to an earlier request came back"):
        guest.mm.page_reporting.report([(1024, 0)])
    assert guest.driver.state is State.FAILED


def test_no_memory_for_a_ring_fails_the_probe_and_frees_the_rest(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False)
    guest.mm.take_all_but(3)
    with pytest.raises(OutOfMemory):
        guest.driver.probe()
    assert guest.mm.nr_free == 3


def test_rings_stay_allocated_if_the_device_does_not_reset(make_guest: MakeGuest) -> None:
    """A device that may still write must not find those pages in other hands."""
    guest = make_guest(probe=False)
    guest.device.acked = guest.driver.features = ALL_FEATURES
    guest.device.sizes[QueueRole.REPORTING] = 3
    guest.device.set_status(15)
    guest.device.never_resets = True
    before = guest.mm.nr_free
    with pytest.raises(DriverError, match="did not reset"):
        find_vqs(
            guest.mm,
            guest.memory,
            guest.device,
            ALL_FEATURES,
            interrupts={},
            wait=lambda queue: None,
            broken=lambda error: None,
        )
    assert guest.mm.nr_free < before
