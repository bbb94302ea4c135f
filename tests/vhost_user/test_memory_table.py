# SPDX-License-Identifier: GPL-2.0-only
"""Memory tables: two regions of one file, hostile ones, and what stays open afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import MessageError
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.payloads import MemTable, Region
from hostzero.vhost_user.protocol import ErrorKind
from tests.vhost_user.backend import null_fd, open_fds

SIZE = 64 * PAGE_SIZE
HALF = SIZE // 2
LOW = Region(0, HALF, 0x10_0000, 0)
HIGH = Region(1 << 32, HALF, 0x90_0000, HALF)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def test_two_regions_of_one_file(memfd: int) -> None:
    table = MappedTable(MemTable((HIGH, LOW)), [memfd, memfd])
    os.pwrite(memfd, b"low", 5)
    os.pwrite(memfd, b"high", HALF + 5)
    assert table.memory.read(Gpa(5), 3) == b"low"
    assert table.memory.read(Gpa((1 << 32) + 5), 4) == b"high"
    assert table.size == SIZE
    assert table.memory.discard(Gpa(1 << 32), PAGE_SIZE)
    assert os.pread(memfd, 4, HALF + 5) == bytes(4)
    assert os.pread(memfd, 3, 5) == b"low"
    table.close()


def test_allocated_memory_is_counted_once_for_each_file(memfd: int) -> None:
    """Quirk: QEMU sends the same memfd for each region; its blocks are there once."""
    other = os.memfd_create("other")
    os.ftruncate(other, SIZE)
    os.pwrite(memfd, bytes(4 * PAGE_SIZE), 0)
    os.pwrite(other, bytes(2 * PAGE_SIZE), 0)
    third = Region(1 << 33, SIZE, 0x200_0000, 0)
    table = MappedTable(MemTable((LOW, HIGH, third)), [memfd, memfd, other])
    assert table.allocated() == 6 * PAGE_SIZE
    table.close()
    assert table.allocated() == 0
    os.close(other)


def test_addresses_of_the_front_end(memfd: int) -> None:
    table = MappedTable(MemTable((LOW, HIGH)), [memfd, memfd])
    assert table.to_gpa(LOW.user) == 0
    assert table.to_gpa(LOW.user + HALF - 1) == HALF - 1
    assert table.to_gpa(HIGH.user + 16) == (1 << 32) + 16
    for user in (0, LOW.user - 1, LOW.user + HALF, HIGH.user + HALF, (1 << 64) - 1):
        with pytest.raises(MessageError, match="in no memory region") as caught:
            table.to_gpa(user)
        assert caught.value.kind == ErrorKind.MEMORY
    table.close()


HOSTILE = {
    "overlap in guest space": (LOW, HIGH._replace(gpa=HALF - PAGE_SIZE)),
    "overlap in the front end's space": (LOW, HIGH._replace(user=LOW.user + HALF - 1)),
    "share bytes of their file": (LOW, HIGH._replace(mmap_offset=HALF - PAGE_SIZE)),
    "same part of the file twice": (LOW, HIGH._replace(mmap_offset=0)),
    "beyond the end of the file": (LOW, HIGH._replace(mmap_offset=HALF + PAGE_SIZE)),
    "larger than the file": (LOW._replace(size=SIZE + PAGE_SIZE), HIGH._replace(mmap_offset=1 << 40)),
    "size is no page": (LOW, HIGH._replace(size=HALF - 1)),
    "guest address is no page": (LOW, HIGH._replace(gpa=(1 << 32) + 512)),
    "offset is no page": (LOW, HIGH._replace(mmap_offset=HALF + 512, size=PAGE_SIZE)),
    "larger than any address space": (LOW, Region(1 << 32, 1 << 62, 1 << 60, 1 << 61)),
    "offset beyond off_t": (LOW, HIGH._replace(mmap_offset=1 << 63)),
}


@pytest.mark.parametrize("regions", HOSTILE.values(), ids=HOSTILE)
def test_hostile_regions_are_refused_and_nothing_stays_mapped(
    memfd: int, regions: tuple[Region, ...]
) -> None:
    fds, maps = open_fds(), _mappings()
    with pytest.raises(MessageError) as caught:
        MappedTable(MemTable(regions), [memfd, memfd])
    assert caught.value.kind == ErrorKind.MEMORY
    assert (open_fds(), _mappings()) == (fds, maps)


def test_a_file_that_cannot_be_mapped_writable_is_refused(memfd: int) -> None:
    read_only = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    folder = os.open("/", os.O_RDONLY)
    for fd in (read_only, folder, null_fd(), os.eventfd(0), os.memfd_create("empty")):
        before = open_fds()
        with pytest.raises(MessageError) as caught:
            MappedTable(MemTable((LOW,)), [fd])
        assert caught.value.kind == ErrorKind.MEMORY
        assert open_fds() == before
        os.close(fd)


def test_a_sparse_file_of_any_size_can_be_shared() -> None:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1 << 44)
    table = MappedTable(MemTable((Region(0, 1 << 44, 1 << 45, 0),)), [fd])
    assert table.allocated() == 0
    table.close()
    os.close(fd)


def test_closing_unmaps_and_closes_once(memfd: int) -> None:
    fds, maps = open_fds(), _mappings()
    table = MappedTable(MemTable((LOW, HIGH)), [memfd, memfd])
    assert _mappings() == maps + 2
    table.close()
    table.close()
    assert (open_fds(), _mappings()) == (fds, maps)


@given(
    st.lists(
        st.builds(
            Region,
            st.sampled_from([0, PAGE_SIZE, HALF, 1 << 32, (1 << 64) - HALF]),
            st.sampled_from([PAGE_SIZE, HALF, SIZE, 1]),
            st.sampled_from([0, HALF, SIZE, 1 << 47, (1 << 64) - SIZE]),
            st.sampled_from([0, PAGE_SIZE, HALF, SIZE - 1, SIZE]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_table_that_is_taken_has_no_byte_twice(regions: list[Region]) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    try:
        table = MappedTable(MemTable(tuple(regions)), [fd] * len(regions))
    except MessageError:
        return
    finally:
        os.close(fd)
    seen: set[int] = set()
    for region in table.regions:
        assert region.mmap_offset + region.size <= SIZE
        for page in range(region.mmap_offset, region.mmap_offset + region.size, PAGE_SIZE):
            assert page not in seen
            seen.add(page)
        assert table.to_gpa(region.user) == region.gpa
    table.close()


def _mappings() -> int:
    return sum("/memfd:guest" in line for line in Path("/proc/self/maps").read_text().splitlines())
