# SPDX-License-Identifier: GPL-2.0-only
"""The shims: success is silent, failure is an OSError that names the call."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from hostzero.ram import libc
from hostzero.ram.mapping import Mapping
from hostzero.units import PAGE_SIZE, PMD_SIZE


@pytest.fixture
def file() -> Iterator[int]:
    """A shmem file of 2 MiB."""
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.ftruncate(fd, PMD_SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("call", "number", "named"),
    [
        (lambda: libc.madvise(1, PAGE_SIZE, mmap.MADV_DONTNEED), errno.EINVAL, "madvise: Invalid argument"),
        (lambda: libc.mincore(1, PAGE_SIZE), errno.EINVAL, "mincore: "),
        (lambda: libc.punch_hole(-1, 0, PAGE_SIZE), errno.EBADF, "fallocate: Bad file descriptor"),
        (lambda: libc.filesystem(-1), errno.EBADF, "fstatfs: "),
        (lambda: libc.fsconfig_set(-1, b"huge", b"always"), None, "fsconfig: "),
        (lambda: libc.fsconfig_create(-1), None, "fsconfig: "),
        (lambda: libc.fsmount(-1), None, "fsmount: "),
        (lambda: libc.fsopen(b"no such filesystem"), None, "fsopen: "),
    ],
)
def test_a_refused_call_is_an_error_with_its_name(
    call: Callable[[], object], number: int | None, named: str
) -> None:
    with pytest.raises(OSError, match=named) as caught:
        call()
    # Without CAP_SYS_ADMIN the mount calls answer EPERM before they look at anything.
    assert number is None or caught.value.errno == number


def test_a_mapping_over_nothing_is_refused() -> None:
    window = Mapping(PMD_SIZE)
    with pytest.raises(OSError, match="mmap: Bad file descriptor"):
        libc.map_shared_fixed(window.base, PMD_SIZE, -1, 0, reserve=True)
    window.release()


def test_filesystem_tells_shmem_and_its_page(file: int) -> None:
    assert libc.filesystem(file) == (libc.TMPFS_MAGIC, mmap.PAGESIZE)


def test_mincore_has_a_byte_for_each_page(file: int) -> None:
    window = Mapping(PMD_SIZE)
    window.map_file(file, 0, reserve=False)
    window.window()[5 * PAGE_SIZE] = 1
    resident = [page for page, byte in enumerate(libc.mincore(window.base, PMD_SIZE)) if byte & 1]
    assert len(libc.mincore(window.base, PMD_SIZE)) == PMD_SIZE // mmap.PAGESIZE
    assert 5 in resident
    window.release()


def test_a_hole_keeps_the_files_size(file: int) -> None:
    os.pwrite(file, b"x" * PAGE_SIZE, PMD_SIZE - PAGE_SIZE)
    libc.punch_hole(file, PMD_SIZE - PAGE_SIZE, PAGE_SIZE)
    assert os.fstat(file).st_size == PMD_SIZE
    assert os.pread(file, PAGE_SIZE, PMD_SIZE - PAGE_SIZE) == bytes(PAGE_SIZE)
