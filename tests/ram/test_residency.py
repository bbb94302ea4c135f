# SPDX-License-Identifier: GPL-2.0-only
"""What is counted as resident on each backing, and that asking takes no memory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from hostzero.errors import RangeError
from hostzero.ram import Ram, libc, open_ram, residency
from hostzero.units import PAGE_SIZE, PMD_SIZE
from tests.ram.host import SIZE, fill


@pytest.fixture
def small_pages() -> Iterator[Ram]:
    """Anonymous RAM in 4 KiB pages."""
    with open_ram(SIZE) as ram:
        libc.madvise(ram.base, SIZE, mmap.MADV_NOHUGEPAGE)
        yield ram


@pytest.fixture
def pagemap() -> Iterator[int]:
    """This process's open pagemap."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def test_new_ram_is_not_resident_and_asking_leaves_it_so(ram: Ram) -> None:
    assert [ram.resident() for _ in range(3)] == [0, 0, 0]


def test_filled_ram_is_resident_and_discarded_ram_is_not(ram: Ram) -> None:
    fill(ram)
    assert ram.resident() == SIZE
    assert ram.discard(PMD_SIZE, PMD_SIZE).covers(PMD_SIZE, PMD_SIZE)
    assert ram.resident() == SIZE - PMD_SIZE
    assert ram.resident(PMD_SIZE, PMD_SIZE) == 0
    assert ram.resident(PMD_SIZE) == SIZE - 2 * PMD_SIZE
    assert ram.resident(0, PMD_SIZE + PAGE_SIZE) == PMD_SIZE


def test_a_range_is_counted_to_the_page(small_pages: Ram) -> None:
    for page in (1, 2, 5, 600):
        small_pages.buffer[page * PAGE_SIZE] = 1
    assert small_pages.resident() == 4 * PAGE_SIZE
    assert small_pages.resident(2 * PAGE_SIZE, 4 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert small_pages.resident(3 * PAGE_SIZE, 2 * PAGE_SIZE) == 0


def test_more_separate_pages_than_one_scan_reports_are_all_counted(small_pages: Ram, pagemap: int) -> None:
    pages = small_pages.array(np.uint8)[:: 2 * PAGE_SIZE]
    pages[:] = 1
    assert len(pages) > 512
    assert small_pages.resident() == len(pages) * PAGE_SIZE
    assert residency.read_pagemap(pagemap, small_pages.base, SIZE) == len(pages) * PAGE_SIZE


@pytest.mark.parametrize("advice", [mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE])
def test_the_zero_page_that_a_read_maps_is_no_memory(pagemap: int, advice: int) -> None:
    """mincore(2) does count it, which is why it is not asked on anonymous memory."""
    with open_ram(SIZE) as ram:
        libc.madvise(ram.base, SIZE, advice)
        assert ram.buffer[PAGE_SIZE] == 0
        assert ram.resident() == 0
        assert residency.read_pagemap(pagemap, ram.base, SIZE) == 0
        assert sum(byte & 1 for byte in libc.mincore(ram.base, SIZE)) > 0


def test_a_shared_page_stays_resident_when_only_our_mapping_of_it_goes() -> None:
    """The pagemap would say nothing is there, which is why it is not asked on shared memory."""
    with open_ram(SIZE, "memfd") as ram:
        fill(ram)
        libc.madvise(ram.base, SIZE, mmap.MADV_DONTNEED)
        assert residency.private_resident(ram.base, SIZE) == 0
        assert ram.resident() == SIZE


def test_what_a_peer_has_written_is_resident_here_too() -> None:
    with open_ram(SIZE, "memfd") as ram:
        assert ram.fileno is not None
        with Ram.from_fd(ram.fileno, 0, SIZE) as peer:
            peer.buffer[PMD_SIZE] = 1
            assert 0 < ram.resident() <= PMD_SIZE
            assert ram.resident(PMD_SIZE, PMD_SIZE) == ram.resident()


def test_a_kernel_without_the_scan_is_asked_through_pagemap(
    small_pages: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOTTY, "stub")

    small_pages.buffer[0] = 1
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert small_pages.resident() == PAGE_SIZE


def test_a_scan_that_fails_otherwise_is_not_hidden(small_pages: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EFAULT, "stub")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(OSError, match="stub"):
        residency.private_resident(small_pages.base, SIZE)


def test_large_ranges_are_asked_in_pieces(
    small_pages: Ram, pagemap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_PAGEMAP_CHUNK", 100)
    monkeypatch.setattr(residency, "_PAGES_PER_READ", 100)
    small_pages.array(np.uint8)[: 1000 * PAGE_SIZE : PAGE_SIZE] = 1
    assert residency.read_pagemap(pagemap, small_pages.base, SIZE) == 1000 * PAGE_SIZE
    with open_ram(SIZE, "memfd") as ram:
        ram.array(np.uint8)[: 1000 * PAGE_SIZE : PAGE_SIZE] = 1
        assert ram.resident(0, 1000 * PAGE_SIZE) == 1000 * PAGE_SIZE


def test_the_rest_from_the_very_end_is_an_empty_range(ram: Ram) -> None:
    with pytest.raises(RangeError, match="empty"):
        ram.resident(SIZE)
