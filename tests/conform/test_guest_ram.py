# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hostzero.conform.guest_ram import GuestRam
from hostzero.conform.in_process import InProcessTarget
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with InProcessTarget().connect() as connection:
        ram = GuestRam(connection)
        yield ram
        ram.close()


def test_no_word_of_the_pattern_is_zero_and_none_is_there_twice(ram: GuestRam) -> None:
    words = np.frombuffer(ram.read(ram.data.start, PMD_SIZE), dtype=np.uint64)
    assert words.all()
    assert np.unique(words).size == words.size


def test_a_single_changed_byte_is_found(ram: GuestRam) -> None:
    assert ram.changed() == []
    at = ram.data.stop - 3
    byte = ram.read(at, 1)[0]
    ram.memory.write(Gpa(at), bytes([byte ^ 0x10]))
    assert ram.changed() == [ram.data.stop - 8]


def test_a_page_that_was_given_away_may_change_until_it_is_written_again(ram: GuestRam) -> None:
    page = ram.pages(2)
    ram.may_change([page])
    ram.memory.discard(Gpa(page * PAGE_SIZE), PAGE_SIZE)
    assert ram.changed() == []
    assert not ram.is_kept(page)
    ram.fill(page, 1, 0x5A)
    assert ram.is_kept(page)
    ram.memory.discard(Gpa(page * PAGE_SIZE), PAGE_SIZE)
    assert ram.changed()[0] == page * PAGE_SIZE


def test_pages_that_are_no_data_pages_are_ignored(ram: GuestRam) -> None:
    ram.may_change([0, 1 << 40, -1])
    ram.memory.write(Gpa(0), b"x")
    assert ram.changed() == []


def test_pages_do_not_touch_each_other(ram: GuestRam) -> None:
    first, second = ram.pages(4), ram.pages(4)
    assert second >= first + 5
    assert ram.pages(512, 512) % 512 == 0


def test_there_is_an_end_to_pages_and_buffers(ram: GuestRam) -> None:
    with pytest.raises(ValueError, match="more pages"):
        ram.pages(1 << 20)
    with pytest.raises(ValueError, match="more buffers"):
        ram.control(1 << 22)


def test_buffers_are_zeroed_aligned_and_given_back_by_rewind(ram: GuestRam) -> None:
    first = ram.control(3)
    ram.write(first, b"abc")
    second = ram.control(16, 64)
    assert second % 64 == 0
    assert second > first
    ram.rewind()
    assert ram.control(3) == first
    assert ram.read(first, 3) == bytes(3)


def test_rings_have_pages_of_their_own(ram: GuestRam) -> None:
    ring, other = ram.ring(128), ram.ring(128)
    assert ring.desc % PAGE_SIZE == 0
    assert other.desc >= ring.used + 6 + 8 * 128


def test_zero_and_resident(ram: GuestRam) -> None:
    page = ram.pages(1)
    assert ram.resident(page, 1) == PAGE_SIZE
    ram.memory.discard(Gpa(page * PAGE_SIZE), PAGE_SIZE)
    assert ram.resident(page, 1) == 0
    assert ram.is_zero(page * PAGE_SIZE, PAGE_SIZE)
    assert ram.is_zero(page * PAGE_SIZE, 0)
    assert not ram.is_zero((page + 1) * PAGE_SIZE, PAGE_SIZE)


def test_where_ram_ends(ram: GuestRam) -> None:
    assert ram.end_of_ram == ram.data.stop
    assert ram.last_pages(1) == ram.data.stop // PAGE_SIZE - 1
    assert not ram.memory.contains(Gpa(ram.data.stop), 1)
    assert not ram.memory.contains(Gpa(ram.nowhere), 1)
    assert ram.host_page == 1
