# SPDX-License-Identifier: GPL-2.0-only
"""The oracle: what may change, and that every other byte is missed."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hostzero.conform.fuzz.arena import (
    BITMAP_BYTES_MAX,
    DATA_PAGES,
    DATA_PFN,
    END_PFN,
    FILE_NAME,
    FILE_PAGES,
    LOW_GPAS,
    LOW_PAGES,
    USED_BYTES_MAX,
    Arena,
)
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.ram import libc
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from tests.conform.fuzz.fakes import drop, open_files

DATA = DATA_PFN << PAGE_SHIFT
FAR = (DATA_PFN + DATA_PAGES) << PAGE_SHIFT
END = END_PFN << PAGE_SHIFT
PAGE = DATA_PFN + 5
AT = PAGE << PAGE_SHIFT


@pytest.fixture
def arena() -> Iterator[Arena]:
    with contextlib.closing(Arena(0)) as made:
        yield made


def wreck(arena: Arena, gpa: int, length: int = 1) -> None:
    """Turn every bit of some bytes."""
    before = np.frombuffer(arena.guest.read(Gpa(gpa), length), dtype=np.uint8)
    arena.guest.write(Gpa(gpa), (~before).tobytes())


def zero(arena: Arena, pfn: int, count: int = 1) -> None:
    drop(arena, pfn << PAGE_SHIFT, count * PAGE_SIZE)


def found(arena: Arena) -> str:
    with pytest.raises(Found) as caught:
        arena.check()
    assert caught.value.kind is Kind.CONTENT
    return str(caught.value)


@pytest.mark.parametrize("low", sorted(set(LOW_GPAS)))
def test_nothing_is_found_where_only_low_memory_changes(low: int) -> None:
    with contextlib.closing(Arena(low)) as arena:
        arena.check()
        arena.guest.write(Gpa(low), b"\x55" * (LOW_PAGES * PAGE_SIZE))
        arena.check()
        arena.drop_low(3, 2)
        assert arena.guest.read(Gpa(low + 3 * PAGE_SIZE - 1), 3) == b"\x55\0\0"
        arena.check()


@pytest.mark.parametrize("gpa", [DATA, AT + 7, FAR - 1, FAR, END - 1])
def test_a_byte_that_nothing_named_is_found(arena: Arena, gpa: int) -> None:
    arena.name_pages(np.array([pfn for pfn in range(DATA_PFN, END_PFN) if pfn != gpa >> PAGE_SHIFT]))
    wreck(arena, gpa)
    now = arena.guest.read(Gpa(gpa), 1)[0]
    where = f"page {gpa >> PAGE_SHIFT:#x} changed and nothing named it"
    assert found(arena) == f"{where}: the byte at {gpa % PAGE_SIZE:#x} is {now:#x}"


def test_what_is_between_the_regions_may_not_even_be_zero(arena: Arena) -> None:
    arena.name_pages(np.array([DATA_PFN - 1, DATA_PFN + DATA_PAGES, END_PFN]))
    regions = arena.table()[0].regions
    for below, above in zip(regions, [*regions[1:], None], strict=True):
        first = (below.mmap_offset + below.size) // PAGE_SIZE
        last = (FILE_PAGES if above is None else above.mmap_offset // PAGE_SIZE) - 1
        assert first < last
        for page in (first, last):
            before = os.pread(arena.fd, PAGE_SIZE, page * PAGE_SIZE)
            libc.punch_hole(arena.fd, page * PAGE_SIZE, PAGE_SIZE)
            assert f"page {page} of the file, which is in no region, changed" in found(arena)
            os.pwrite(arena.fd, before, page * PAGE_SIZE)
    arena.check()


def test_a_named_page_may_be_zero(arena: Arena) -> None:
    arena.name_pages(np.array([PAGE, DATA_PFN, END_PFN - 1]))
    for pfn in (PAGE, DATA_PFN, END_PFN - 1):
        zero(arena, pfn)
        arena.check()


def test_its_neighbours_may_not(arena: Arena) -> None:
    arena.name_pages(np.array([PAGE]))
    zero(arena, PAGE, 2)
    assert f"page {PAGE + 1:#x} changed and nothing named it" in found(arena)


@pytest.mark.parametrize(("at", "length"), [(0, 1), (0, PAGE_SIZE - 1), (1, PAGE_SIZE - 1), (2048, 1024)])
def test_a_named_page_that_changed_in_part_is_found(arena: Arena, at: int, length: int) -> None:
    arena.name_pages(np.array([PAGE]))
    arena.guest.write(Gpa(AT + at), bytes(length))
    assert f"page {PAGE:#x} changed in part: the byte at {at:#x} is 0x0" in found(arena)


def test_a_named_page_with_other_bytes_is_found(arena: Arena) -> None:
    arena.name_pages(np.array([PAGE]))
    wreck(arena, AT, PAGE_SIZE)
    assert "changed in part" in found(arena)


def test_pages_outside_of_memory_can_be_named(arena: Arena) -> None:
    arena.name_pages(np.array([0, DATA_PFN - 1, END_PFN, (1 << 32) - 1, -1]))
    for pfn in (DATA_PFN, END_PFN - 1):
        zero(arena, pfn)
        assert f"{pfn:#x} changed and nothing named it" in found(arena)
        arena.name_pages(np.array([pfn]))
        arena.check()


# ---------------------------------------------------------------------------- what bytes can name


@pytest.mark.parametrize("before", range(8))
def test_a_number_is_seen_at_every_alignment(arena: Arena, before: int) -> None:
    arena.name_words(b"\xee" * before + struct.pack("<I", PAGE) + b"\xee" * 3)
    zero(arena, PAGE)
    arena.check()
    zero(arena, PAGE + 1)
    assert f"{PAGE + 1:#x}" in found(arena)


@pytest.mark.parametrize("length", range(4))
def test_a_number_that_is_cut_names_nothing(arena: Arena, length: int) -> None:
    arena.name_words(struct.pack("<I", PAGE)[:length])
    zero(arena, PAGE)
    found(arena)


def test_what_memory_is_filled_with_names_no_page_of_it(arena: Arena) -> None:
    for region in arena.table()[0].regions[1:]:
        assert min(arena.guest.read(Gpa(region.gpa), region.size)) >= 0x80
    assert END_PFN < 0x8080_8080


# ---------------------------------------------------------------------------- segments and rings


def test_a_segment_of_whole_pages_may_be_dropped(arena: Arena) -> None:
    arena.name_segment(AT, 3 * PAGE_SIZE)
    zero(arena, PAGE, 3)
    arena.check()
    zero(arena, PAGE + 3)
    assert f"{PAGE + 3:#x}" in found(arena)


@pytest.mark.parametrize(
    ("gpa", "length", "page"),
    [
        (AT + 4, PAGE_SIZE, PAGE),
        (AT, PAGE_SIZE - 1, PAGE),
        (AT + 4, 3 * PAGE_SIZE, PAGE),
        (AT, 3 * PAGE_SIZE - 1, PAGE + 1),
    ],
)
def test_a_segment_with_parts_of_pages_may_not(arena: Arena, gpa: int, length: int, page: int) -> None:
    arena.name_segment(gpa, length)
    zero(arena, page)
    assert f"page {page:#x} changed and nothing named it" in found(arena)


def test_a_segment_may_be_answered_up_to_its_end(arena: Arena) -> None:
    arena.name_segment(AT + 10, 20)
    wreck(arena, AT + 10, 20)
    arena.check()
    wreck(arena, AT + 30)
    assert "the byte at 0x1e" in found(arena)


def test_no_answer_is_longer_than_the_longest(arena: Arena) -> None:
    arena.name_segment(AT + 10, 1 << 16)
    wreck(arena, AT + 10, BITMAP_BYTES_MAX)
    arena.check()
    wreck(arena, AT + 10 + BITMAP_BYTES_MAX)
    found(arena)


def test_a_page_may_be_dropped_and_answered_on(arena: Arena) -> None:
    arena.name_segment(AT + 10, 20)
    arena.name_pages(np.array([PAGE]))
    zero(arena, PAGE)
    wreck(arena, AT + 10, 20)
    arena.check()
    wreck(arena, AT + 9)
    assert "changed in part" in found(arena)


def test_a_segment_reaches_from_one_region_into_the_next(arena: Arena) -> None:
    arena.name_segment(FAR - PAGE_SIZE, 2 * PAGE_SIZE)
    zero(arena, DATA_PFN + DATA_PAGES - 1)
    zero(arena, DATA_PFN + DATA_PAGES)
    arena.check()
    arena.name_segment(FAR - 8, 16)
    wreck(arena, FAR - 8, 8)
    wreck(arena, FAR, 8)
    arena.check()


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (END - PAGE_SIZE, 2 * PAGE_SIZE),
        (DATA - PAGE_SIZE, 2 * PAGE_SIZE),
        (DATA, 1 << 32),
        (DATA, 0),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
)
def test_a_segment_that_is_not_all_memory_gives_nothing_away(arena: Arena, gpa: int, length: int) -> None:
    arena.name_segment(gpa, length)
    for pfn in (DATA_PFN, END_PFN - 1):
        zero(arena, pfn)
        assert f"page {pfn:#x} changed and nothing named it" in found(arena)
        arena.name_pages(np.array([pfn]))


def test_a_used_ring_may_be_written_where_it_was_said_to_be(arena: Arena) -> None:
    arena.name_ring(AT + 4)
    wreck(arena, AT + 4, USED_BYTES_MAX)
    arena.check()
    wreck(arena, AT + 4 + USED_BYTES_MAX)
    found(arena)


def test_a_ring_ends_with_its_region(arena: Arena) -> None:
    arena.name_ring(END - 8)
    wreck(arena, END - 8, 8)
    arena.check()
    last = arena.table()[0].regions[-1]
    os.pwrite(arena.fd, b"\0", last.mmap_offset + last.size)
    assert "in no region" in found(arena)


# ---------------------------------------------------------------------------- what a front end says


@pytest.mark.parametrize("low", sorted(set(LOW_GPAS)))
def test_the_table_says_where_guest_memory_is(low: int) -> None:
    with contextlib.closing(Arena(low)) as arena:
        table, fds = arena.table()
        assert fds == [arena.fd] * 3
        for region in table.regions:
            for at in (0, region.size - 1):
                arena.guest.write(Gpa(region.gpa + at), b"!")
                assert os.pread(arena.fd, 1, region.mmap_offset + at) == b"!"
                assert arena.user(region.gpa + at) == region.user + at


@pytest.mark.parametrize("gpa", [DATA - 1, END, (1 << 64) - 1, LOW_PAGES * PAGE_SIZE])
def test_an_address_outside_has_none_at_the_front_end(arena: Arena, gpa: int) -> None:
    user = arena.user(gpa)
    assert user < 1 << 63
    assert not any(region.user <= user < region.user + region.size for region in arena.table()[0].regions)


def test_pages_are_those_of_their_number(arena: Arena) -> None:
    assert arena.pages(PAGE, 2).tobytes() == arena.guest.read(Gpa(AT), 2 * PAGE_SIZE)
    with pytest.raises(AssertionError, match="only DATA"):
        arena.pages(DATA_PFN + DATA_PAGES - 1, 2)


# ---------------------------------------------------------------------------- its end


def test_nothing_is_said_of_a_file_that_was_cut(arena: Arena) -> None:
    arena.cut()
    assert os.fstat(arena.fd).st_size == 0
    arena.check()  # a SIGBUS, if it looked


def test_nothing_is_left(arena: Arena) -> None:
    mapped = Path("/proc/self/maps").read_text().count(FILE_NAME)
    before = open_files()
    other = Arena(LOW_GPAS[-1])
    assert open_files() > before
    wreck(other, AT)
    found(other)
    other.close()
    assert open_files() == before
    assert Path("/proc/self/maps").read_text().count(FILE_NAME) == mapped
