# SPDX-License-Identifier: GPL-2.0-only
"""Guest space: any integers may come in, and only bytes of one region may be touched."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hostzero.errors import RangeError
from hostzero.ram import GuestMemory, MemoryRegion, Ram, libc, open_ram
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from tests.ram.host import SIZE, fill

HIGH = Gpa(1 << 32)
LOW_SIZE = 0xA0000

fixture_ok = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Three regions of one RAM: two that touch in guest space, and one above 4 GiB."""
    with open_ram(SIZE, "memfd") as ram:
        fill(ram)
        yield GuestMemory(
            [
                MemoryRegion(HIGH, ram, PMD_SIZE, PMD_SIZE),
                MemoryRegion(Gpa(0), ram, 0, LOW_SIZE),
                MemoryRegion(Gpa(LOW_SIZE), ram, 2 * PMD_SIZE, PMD_SIZE),
            ]
        )


edges = [0, LOW_SIZE, LOW_SIZE + PMD_SIZE, HIGH, HIGH + PMD_SIZE, 1 << 63, 1 << 64]
addresses = st.integers() | st.builds(
    lambda edge, step: edge + step, st.sampled_from(edges), st.integers(-3 * PAGE_SIZE, 3 * PAGE_SIZE)
)
lengths = st.integers() | st.integers(-2, 3 * PAGE_SIZE) | st.sampled_from(edges)


def inside_one(memory: GuestMemory, gpa: int, length: int) -> MemoryRegion | None:
    # The obvious twin of the lookup: try every region.
    for region in memory.regions:
        if length >= 0 and region.gpa <= gpa < region.gpa + region.size:
            return region if gpa + length <= region.gpa + region.size else None
    return None


@fixture_ok
@given(gpa=addresses, length=lengths)
@example(gpa=LOW_SIZE - 1, length=2)
@example(gpa=2**64 - 1, length=2)
@example(gpa=2**64, length=1)
@example(gpa=-1, length=2)
@example(gpa=HIGH, length=2**64)
@example(gpa=HIGH + PMD_SIZE, length=0)
def test_any_integers_give_the_right_bytes_or_a_range_error(
    memory: GuestMemory, gpa: int, length: int
) -> None:
    region = inside_one(memory, gpa, length)
    assert memory.contains(Gpa(gpa), length) == (region is not None)
    if region is None:
        with pytest.raises(RangeError, match=hex(gpa)):
            memory.view(Gpa(gpa), length)
        return
    start = region.offset + gpa - region.gpa
    view = memory.view(Gpa(gpa), length)
    assert not view.readonly
    assert view == region.ram.buffer[start : start + length]


@fixture_ok
@given(gpa=addresses, length=lengths, scale=st.sampled_from([1, PAGE_SIZE]))
def test_a_bad_discard_is_refused_before_any_system_call(
    memory: GuestMemory, no_discard_calls: None, gpa: int, length: int, scale: int
) -> None:
    gpa, length = gpa - gpa % scale, length - length % scale
    good = length > 0 and gpa % PAGE_SIZE == 0 and length % PAGE_SIZE == 0
    if good and inside_one(memory, gpa, length) is not None:
        with pytest.raises(AssertionError, match="a system call was made"):
            memory.discard(Gpa(gpa), length)
    else:
        with pytest.raises(RangeError):
            memory.discard(Gpa(gpa), length)


def test_numpy_integers_cannot_wrap_past_the_end(memory: GuestMemory) -> None:
    gpa, length = np.uint64(HIGH + PAGE_SIZE), np.uint64(2**64 - PAGE_SIZE)
    assert not memory.contains(Gpa(gpa), length)  # type: ignore[arg-type]
    with pytest.raises(RangeError):
        memory.view(Gpa(gpa), length)  # type: ignore[arg-type]
    assert memory.read(Gpa(gpa), np.uint64(8)) == memory.read(Gpa(HIGH + PAGE_SIZE), 8)  # type: ignore[arg-type]


def test_narrow_numpy_integers_are_addresses_like_any_other(memory: GuestMemory) -> None:
    view = memory.view(Gpa(np.uint8(200)), np.uint8(100))  # type: ignore[arg-type]
    assert view == memory.view(Gpa(200), 100)


def test_a_range_over_two_touching_regions_is_refused_and_nothing_is_written(memory: GuestMemory) -> None:
    """They touch in guest space and lie 1.4 MiB apart on the host."""
    gpa = Gpa(LOW_SIZE - 4)
    before = memory.read(gpa, 4), memory.read(Gpa(LOW_SIZE), 4)
    with pytest.raises(RangeError, match="not inside one memory region"):
        memory.write(gpa, b"\0" * 8)
    with pytest.raises(RangeError):
        memory.discard(Gpa(LOW_SIZE - PAGE_SIZE), 2 * PAGE_SIZE)
    assert (memory.read(gpa, 4), memory.read(Gpa(LOW_SIZE), 4)) == before


@pytest.mark.parametrize("data", [b"abcd", bytearray(b"abcd"), memoryview(b"dcba")[::1], np.arange(2)])
def test_what_is_written_is_read_back_and_nothing_beside_it(memory: GuestMemory, data: bytes) -> None:
    gpa = Gpa(HIGH + 100)
    size = memoryview(data).nbytes
    around = memory.read(Gpa(gpa - 8), 8), memory.read(Gpa(gpa + size), 8)
    memory.write(gpa, data)
    assert memory.read(gpa, size) == bytes(data)
    assert (memory.read(Gpa(gpa - 8), 8), memory.read(Gpa(gpa + size), 8)) == around


def test_a_view_is_the_guests_own_bytes(memory: GuestMemory) -> None:
    memory.view(HIGH, 4)[:] = b"ring"
    ram = memory.regions[-1].ram
    assert bytes(ram.buffer[PMD_SIZE : PMD_SIZE + 4]) == b"ring"


def test_empty_data_goes_nowhere_but_to_a_guest_address(memory: GuestMemory) -> None:
    memory.write(HIGH, b"")
    assert memory.read(HIGH, 0) == b""
    with pytest.raises(RangeError):
        memory.write(Gpa(1 << 40), b"")


def test_a_discard_zeroes_that_range_and_no_other_page(memory: GuestMemory) -> None:
    ram = memory.regions[0].ram
    pages = ram.array(np.uint64).reshape(-1, 512)
    expected = pages.copy()
    assert memory.discard(Gpa(HIGH + PAGE_SIZE), 3 * PAGE_SIZE)
    expected[513:516] = 0
    assert np.array_equal(pages, expected)


def test_a_failed_discard_is_not_zero_and_is_logged(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "sealed")

    monkeypatch.setattr(libc, "punch_hole", refuse)
    with caplog.at_level(logging.WARNING, "hostzero.ram"):
        for _ in range(3):
            assert memory.discard(HIGH, PAGE_SIZE) is False
    assert "sealed" in caplog.text
    assert len(caplog.records) == 1


def test_a_discard_that_is_proven_in_part_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "filesystem", lambda fd: (libc.HUGETLBFS_MAGIC, PMD_SIZE))
    with open_ram(SIZE, "memfd") as ram:
        memory = GuestMemory.whole(ram)
        fill(ram)
        assert memory.page_size(Gpa(0)) == PMD_SIZE
        assert memory.discard(Gpa(0), PMD_SIZE + PAGE_SIZE) is False
        assert memory.read(Gpa(PMD_SIZE), 1) != b"\0"
        assert memory.discard(Gpa(PMD_SIZE), PMD_SIZE) is True


def test_page_size_is_that_of_the_ram_at_the_address(memory: GuestMemory) -> None:
    assert memory.page_size(HIGH) == memory.page_size(Gpa(5)) == PAGE_SIZE
    for gpa in (-1, LOW_SIZE + PMD_SIZE, HIGH + PMD_SIZE):
        with pytest.raises(RangeError):
            memory.page_size(Gpa(gpa))


def test_whole_ram_starts_at_address_zero(ram: Ram) -> None:
    memory = GuestMemory.whole(ram)
    assert memory.regions == (MemoryRegion(Gpa(0), ram, 0, SIZE),)
    ram.buffer[17] = 3
    assert memory.read(Gpa(17), 1) == b"\x03"


def test_no_regions_hold_no_address() -> None:
    assert not GuestMemory([]).contains(Gpa(0), 0)


@pytest.mark.parametrize(
    ("gpa", "offset", "size", "named"),
    [
        (0, 0, 0, "not whole 4 KiB pages"),
        (0, 0, -PAGE_SIZE, "not whole 4 KiB pages"),
        (1, 0, PAGE_SIZE, "not whole 4 KiB pages"),
        (0, 8, PAGE_SIZE, "not whole 4 KiB pages"),
        (0, 0, PAGE_SIZE + 1, "not whole 4 KiB pages"),
        (-PAGE_SIZE, 0, PAGE_SIZE, "leaves the 64-bit guest space"),
        (2**64 - PAGE_SIZE, 0, 2 * PAGE_SIZE, "leaves the 64-bit guest space"),
        (0, -PAGE_SIZE, PAGE_SIZE, "leaves the RAM"),
        (0, SIZE, PAGE_SIZE, "leaves the RAM"),
        (0, PAGE_SIZE, SIZE, "leaves the RAM"),
    ],
)
def test_a_region_that_does_not_fit_is_refused(gpa: int, offset: int, size: int, named: str) -> None:
    with open_ram(SIZE) as ram, pytest.raises(RangeError, match=named):
        GuestMemory([MemoryRegion(Gpa(gpa), ram, offset, size)])


def test_the_last_page_of_guest_space_can_be_a_region() -> None:
    with open_ram(SIZE) as ram:
        last = Gpa(2**64 - PAGE_SIZE)
        memory = GuestMemory([MemoryRegion(last, ram, 0, PAGE_SIZE)])
        assert memory.contains(last, PAGE_SIZE)
        assert not memory.contains(last, PAGE_SIZE + 1)


def test_regions_that_overlap_in_guest_space_are_refused() -> None:
    with open_ram(SIZE) as ram, open_ram(SIZE) as other:
        below = MemoryRegion(Gpa(0), ram, 0, 2 * PAGE_SIZE)
        for gpa in (0, PAGE_SIZE):
            with pytest.raises(RangeError, match="overlap in guest space"):
                GuestMemory([MemoryRegion(Gpa(gpa), other, 0, PAGE_SIZE), below])
        GuestMemory([MemoryRegion(Gpa(2 * PAGE_SIZE), other, 0, PAGE_SIZE), below])


def test_regions_that_share_bytes_of_their_ram_are_refused() -> None:
    """A discard of one page would zero another."""
    with open_ram(SIZE) as ram:
        below = MemoryRegion(Gpa(0), ram, 0, 2 * PAGE_SIZE)
        with pytest.raises(RangeError, match="share bytes of their RAM"):
            GuestMemory([below, MemoryRegion(HIGH, ram, PAGE_SIZE, PAGE_SIZE)])
        GuestMemory([below, MemoryRegion(HIGH, ram, 2 * PAGE_SIZE, PAGE_SIZE)])
