# SPDX-License-Identifier: GPL-2.0-only
"""A memfd of our own stands for a guest's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hostzero.errors import VmError
from hostzero.vm.host_memory import HostMemory
from hostzero.vm.steps import marked_page

MIB = 1 << 20


@pytest.fixture
def writer() -> Iterator[int]:
    descriptor = os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC)
    os.truncate(descriptor, 16 * MIB)
    yield descriptor
    os.close(descriptor)


def test_what_is_written_is_backed_and_reading_a_hole_backs_nothing(writer: int) -> None:
    with HostMemory.of(os.getpid()) as memory:
        assert (memory.size, memory.backed()) == (16 * MIB, 0)
        assert list(memory.extents()) == []
        os.pwrite(writer, b"x" * 8192, 4 * MIB)
        assert memory.backed() == 8192
        assert memory.read(4 * MIB - 4, 8) == b"\0\0\0\0xxxx"
        assert memory.read(0, 4096) == bytes(4096)
        assert memory.backed() == 8192
        assert list(memory.extents()) == [(4 * MIB, 8192)]


def test_a_descriptor_that_is_open_twice_is_one_memory(writer: int) -> None:
    again = os.dup(writer)
    with HostMemory.of(os.getpid()) as memory:
        assert memory.size == 16 * MIB
    os.close(again)


def test_pages_with_a_mark_are_found_where_they_lie(writer: int) -> None:
    page = marked_page("here")
    for number in (0, 3, 4, 5, 1023, 1024, 4095):
        os.pwrite(writer, page, number * 4096)
    os.pwrite(writer, marked_page("elsewhere"), 7 * 4096)
    os.pwrite(writer, page, 9 * 4096 + 64)  # not at a page's start: it fills no page
    with HostMemory.of(os.getpid()) as memory:
        assert memory.pages_with(page) == {0, 3, 4, 5, 1023, 1024, 4095}


def test_a_page_is_4096_bytes(writer: int) -> None:
    with HostMemory.of(os.getpid()) as memory, pytest.raises(ValueError, match="4096"):
        memory.pages_with(b"short")


def test_a_process_without_guest_memory_is_said() -> None:
    with pytest.raises(VmError, match="has 0 memfds"):
        HostMemory.of(os.getpid())


def test_a_process_that_is_gone_is_said() -> None:
    with pytest.raises(VmError, match="cannot look"):
        HostMemory.of(1 << 30)


def test_reading_past_the_end_is_said(writer: int) -> None:
    with HostMemory.of(os.getpid()) as memory, pytest.raises(VmError, match="ends before"):
        memory.read(16 * MIB - 1, 2)
