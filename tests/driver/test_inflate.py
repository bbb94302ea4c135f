# SPDX-License-Identifier: GPL-2.0-only
"""Requests of the balloon, and what of the device's bitmap is believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.driver import State
from hostzero.driver.inflate import BALLOON_GFP, trusted_pages
from hostzero.errors import DriverError
from hostzero.mm.gfp import GFP_NOMEMALLOC, GFP_NORETRY, GFP_ZERO
from hostzero.units import Pfn
from hostzero.virtio import Feature, QueueRole, bitmap_bytes
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import ALL_FEATURES, FakeConfig, Request

PLAIN = ALL_FEATURES & ~Feature.DEVICE_INIT_ON_INFLATE


def slow_trusted(bitmap: bytes, used_len: int, pfns: int, per_page: int) -> list[bool]:
    """The rule one bit at a time."""
    bits = []
    for n in range(pfns):
        byte = n // 8
        written = byte < used_len and byte < len(bitmap)
        bits.append(written and bitmap[byte] & (1 << (n % 8)) != 0)
    return [all(bits[start : start + per_page]) for start in range(0, pfns, per_page)]


@given(
    pages=st.integers(1, 32),
    per_page=st.sampled_from([1, 2, 4, 8]),
    used_len=st.integers(-1, 1 << 32),
    data=st.data(),
)
def test_trusted_pages_agrees_with_one_bit_at_a_time(
    pages: int, per_page: int, used_len: int, data: st.DataObject
) -> None:
    """Any bitmap, any used length, also guests whose page is several PFNs."""
    pfns = pages * per_page
    size = bitmap_bytes(pfns)
    bitmap = data.draw(st.binary(min_size=size, max_size=size) | st.just(b"\xff" * size))
    short = data.draw(st.integers(0, size + 1))
    for length in (used_len, short):
        got = trusted_pages(bitmap, length, pfns, per_page)
        assert got.tolist() == slow_trusted(bitmap, length, pfns, per_page)


def test_a_page_of_64_kib_needs_all_of_its_sixteen_bits() -> None:
    bitmap = bytes([0xFF, 0xFF, 0xFF, 0x7F])
    assert trusted_pages(bitmap, 4, 32, 16).tolist() == [True, False]


def test_pages_are_allocated_outside_the_reserves_and_never_zeroed() -> None:
    assert BALLOON_GFP & GFP_NORETRY
    assert BALLOON_GFP & GFP_NOMEMALLOC
    assert not BALLOON_GFP & GFP_ZERO


def test_requests_carry_at_most_256_pfns(make_guest: MakeGuest) -> None:
    """600 pages are 256 + 256 + 88, each page once, and `actual` follows."""
    guest = make_guest()
    guest.device.set_target(600)
    requests = guest.device.of(QueueRole.INFLATE)
    assert [len(request.pfns) for request in requests] == [256, 256, 88]
    told = [pfn for request in requests for pfn in request.pfns]
    assert sorted(told) == sorted(guest.mm.balloon.pages)
    assert guest.driver.num_pages == guest.device.config.actual == 600


def test_the_bitmap_is_a_second_descriptor_of_exactly_one_bit_a_pfn(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.set_target(13)
    (request,) = guest.device.of(QueueRole.INFLATE)
    assert len(request.readable) == 1
    assert [segment.length for segment in request.writable] == [2]


def test_without_bit_7_there_is_no_bitmap_and_no_page_is_zero(make_guest: MakeGuest) -> None:
    """The device discards all the same, but nothing tells the guest."""
    guest = make_guest(features=int(PLAIN))
    guest.device.set_target(20)
    (request,) = guest.device.of(QueueRole.INFLATE)
    assert request.writable == ()
    assert guest.mm.balloon.zeroed == set()


def test_without_bit_7_a_used_length_means_nothing(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(PLAIN), answer=lambda request: None if "S" in request.role.name else 99)
    guest.device.set_target(20)
    assert guest.mm.balloon.zeroed == set()


def test_bit_n_belongs_to_the_nth_pfn_of_the_request(make_guest: MakeGuest) -> None:
    """Neither to the PFN's value nor to its rank: every third page is zeroed, by position."""
    guest = make_guest()
    device = guest.device

    def every_third(request: Request) -> int | None:
        if request.role is QueueRole.INFLATE:
            return device.discard_pfns(request, request.pfns[::3])
        return device.honest(request)

    device.answer = every_third
    device.set_target(7)
    (request,) = device.of(QueueRole.INFLATE)
    assert request.pfns != sorted(request.pfns), "or position and rank are the same"
    assert guest.mm.balloon.zeroed == set(request.pfns[::3])
    guest.driver.remove()
    assert guest.mm.false_claims == []
    assert guest.mm.known_zero.sum() == 3


def test_bits_beyond_the_used_length_are_not_believed(make_guest: MakeGuest) -> None:
    """A device that sets every bit but says it wrote one byte has spoken for eight pages."""
    guest = make_guest()
    device = guest.device

    def one_byte(request: Request) -> int | None:
        if request.role is not QueueRole.INFLATE:
            return device.honest(request)
        device.write_bitmap(request, b"\xff" * bitmap_bytes(len(request.pfns)))
        return 1

    device.answer = one_byte
    device.set_target(40)
    (request,) = device.of(QueueRole.INFLATE)
    assert guest.mm.balloon.zeroed == set(request.pfns[:8])


@pytest.mark.parametrize("used_len", [33, 4096, 0xFFFF_FFFF])
def test_a_used_length_beyond_the_buffer_reads_nothing_outside_it(
    make_guest: MakeGuest, used_len: int
) -> None:
    """The bytes behind the bitmap are the driver's statistics, and they are not zero."""
    guest = make_guest()
    device = guest.device
    device.answer = lambda r: used_len if r.role is QueueRole.INFLATE else device.honest(r)
    device.set_target(256)
    assert guest.driver.num_pages == 256
    assert guest.mm.balloon.zeroed == set(), "the bitmap itself was left all zero"


def test_padding_bits_of_the_last_byte_are_ignored(make_guest: MakeGuest) -> None:
    guest = make_guest()
    device = guest.device

    def all_ones(request: Request) -> int | None:
        if request.role is not QueueRole.INFLATE:
            return device.honest(request)
        return device.write_bitmap(request, b"\xff\xff")

    device.answer = all_ones
    device.set_target(9)
    assert len(guest.mm.balloon.zeroed) == 9


def test_the_bitmap_is_zeroed_before_each_request(make_guest: MakeGuest) -> None:
    """A device that returns the full length without writing must not repeat its last answer."""
    guest = make_guest()
    device = guest.device
    device.set_target(16)
    assert len(guest.mm.balloon.zeroed) == 16
    device.answer = lambda r: 2 if r.role is QueueRole.INFLATE else device.honest(r)
    device.set_target(32)
    assert len(guest.mm.balloon.zeroed) == 16


def test_a_guest_that_poisons_at_run_time_believes_no_bit(make_guest: MakeGuest) -> None:
    """Defence in depth: bit 7 is negotiated, and poisoning shows up afterwards."""
    guest = make_guest()
    guest.mm.config.page_poisoning = True
    guest.device.set_target(16)
    assert guest.driver.num_pages == 16
    assert guest.mm.balloon.zeroed == set()


def test_the_host_is_told_before_a_page_leaves(make_guest: MakeGuest) -> None:
    """MUST_TELL_HOST or not: while the device reads a deflate request no page of it is free."""
    guest = make_guest()
    device = guest.device
    device.set_target(300)
    seen: list[int] = []

    def watch(request: Request) -> int | None:
        if request.role is QueueRole.DEFLATE:
            seen.extend(request.pfns)
            assert not guest.mm.free[request.pfns].any()
            assert len(request.pfns) <= 256
            assert request.writable == (), "a deflate request carries no bitmap"
        return device.honest(request)

    device.answer = watch
    device.set_target(0)
    assert len(seen) == 300
    assert guest.mm.free[seen].all()
    assert guest.driver.num_pages == device.config.actual == 0


def test_known_zero_pages_are_freed_as_known_zero(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.set_target(100)
    pages = list(guest.mm.balloon.pages)
    guest.device.set_target(0)
    assert guest.mm.known_zero[pages].all()
    assert guest.mm.known_zero.sum() == 100
    assert guest.mm.false_claims == []


def test_managed_pages_shrink_unless_deflate_on_oom(make_guest: MakeGuest) -> None:
    with_oom = make_guest()
    with_oom.device.set_target(50)
    assert with_oom.mm.managed == with_oom.mm.nr_pages
    without = make_guest(features=int(ALL_FEATURES & ~Feature.DEFLATE_ON_OOM))
    without.device.set_target(50)
    assert without.mm.managed == without.mm.nr_pages - 50
    without.device.set_target(20)
    assert without.mm.managed == without.mm.nr_pages - 20


def test_an_unanswered_inflate_leaves_its_pages_in_the_balloon(make_guest: MakeGuest) -> None:
    """The device may still act on them, so they are not free before it was reset and removed."""
    guest = make_guest()
    before = guest.mm.nr_free
    guest.device.answer = lambda request: None
    with pytest.raises(DriverError, match="device did not answer"):
        guest.device.set_target(10)
    assert guest.mm.balloon.count == 10
    assert guest.device.statuses[-1] == 0, "a device that does not answer is reset"
    assert guest.driver.state is State.FAILED
    guest.driver.remove()
    assert guest.mm.nr_free > before


def test_an_unanswered_deflate_frees_nothing(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.set_target(10)
    free = guest.mm.nr_free
    guest.device.answer = lambda request: None
    with pytest.raises(DriverError, match="device did not answer"):
        guest.device.set_target(0)
    assert guest.mm.nr_free == free
    assert guest.mm.balloon.count == 10
    assert guest.driver.num_pages == 10


def test_migration_inflates_the_new_page_then_deflates_the_old(make_guest: MakeGuest) -> None:
    """The new page's mark comes from the device, the old page stays the caller's."""
    guest = make_guest()
    guest.device.set_target(4)
    old = Pfn(guest.mm.balloon.pages[0])
    new = guest.mm.alloc_pages(0)
    guest.device.requests.clear()
    assert guest.driver.virtballoon_migratepage(new, old) is True
    assert [(r.role, r.pfns) for r in guest.device.requests] == [
        (QueueRole.INFLATE, [new]),
        (QueueRole.DEFLATE, [old]),
    ]
    assert not guest.mm.page(new).any()


def test_a_bound_driver_moves_balloon_pages_and_a_removed_one_does_not(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False)
    assert guest.mm.balloon.migratepage is None
    guest.driver.probe()
    assert guest.mm.balloon.migratepage == guest.driver.virtballoon_migratepage
    guest.driver.remove()
    assert guest.mm.balloon.migratepage is None


def test_migration_steps_back_while_the_balloon_is_busy(make_guest: MakeGuest) -> None:
    """-EAGAIN, as with the kernel's trylock: compaction may run inside fill_balloon."""
    guest = make_guest()
    device = guest.device
    outcomes: list[type[BaseException]] = []

    def migrate_inside(request: Request) -> int | None:
        if request.role is QueueRole.INFLATE:
            with pytest.raises(BlockingIOError) as caught:
                guest.driver.virtballoon_migratepage(Pfn(1), Pfn(2))
            outcomes.append(caught.type)
        return device.honest(request)

    device.answer = migrate_inside
    device.set_target(1)
    assert outcomes == [BlockingIOError]


def test_poison_bits_do_not_survive_a_confidential_guest(make_guest: MakeGuest) -> None:
    """The wire has no bitmap at all then: nothing is left to be believed by accident."""
    guest = make_guest(config=FakeConfig(confidential=True))
    guest.device.set_target(8)
    assert guest.device.of(QueueRole.INFLATE)[0].writable == ()
    assert np.array_equal(guest.mm.known_zero, np.zeros(guest.mm.nr_pages, dtype=np.bool_))
