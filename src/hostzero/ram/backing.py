# SPDX-License-Identifier: GPL-2.0-only
"""The kinds of memory that guest RAM can stand on, and what a discard proves on each.

================  =====================  ==========================  =======================
backing           mapping                discard                     unit of the proof
================  =====================  ==========================  =======================
``anonymous``     private, huge pages    madvise(MADV_DONTNEED)      host page
                  advised
``memfd``         shared shmem           fallocate(PUNCH_HOLE)       host page
``tmpfs-huge``    shared shmem, mount    fallocate(PUNCH_HOLE)       host page
                  with huge=always
``hugetlb``       shared hugetlbfs       fallocate(PUNCH_HOLE)       huge page of the file
received fd,      shared                 fallocate(PUNCH_HOLE)       as the file's kind
shmem, hugetlbfs
received fd,      shared                 fallocate(PUNCH_HOLE)       nothing is proven
other filesystem
================  =====================  ==========================  =======================

The facts behind the table; tests/ram/test_backing.py reads bytes back for each that
this machine can show:

- MADV_DONTNEED gives zero-fill-on-demand pages on private anonymous memory, and there
  only. On a shared mapping it drops page table entries and returns 0, while the file
  keeps every byte (madvise(2)). On a private file mapping the file's bytes come back.
- MADV_FREE lets the old bytes be read until the kernel needs the page (madvise(2)).
- PUNCH_HOLE removes the file's pages, so that every shared mapping of it reads zero
  (fallocate(2); shmem_fallocate, hugetlbfs_punch_hole). It does not reach copies that a
  peer made through a private mapping of the same file.
- Lengths round. madvise(2) rounds up to a host page: half a page wipes a whole one.
  hugetlbfs_punch_hole rounds inward to whole huge pages for freeing. The caller
  (`Ram.discard`) rounds inward to `page_size` first, so neither is relied on.
- Half a transparent huge page is discarded and reads zero, on anonymous memory and on
  huge shmem (the kernel splits or clears it), but the folio's memory comes back only
  when the folio is split. The zero is proven; the saving is not.
- Reading a hole of a shared file gives it a page again; reading private anonymous memory
  maps the shared zero page and takes nothing.
- A hole in hugetlbfs gives its page back to the pool, and with it the reservation. If
  something else takes the page, the next touch is a SIGBUS: size the pool for all.
- Other filesystems promise the same in fallocate(2), but some only pass the promise on
  (FUSE, network filesystems); without evidence, no proof.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Final, Protocol, Self

from hostzero.errors import BackingUnavailable, RangeError
from hostzero.ram import huge_tmpfs, libc, residency
from hostzero.ram.mapping import Mapping
from hostzero.units import PAGE_SIZE, PMD_SHIFT, PMD_SIZE, format_size

_log = logging.getLogger(__name__)

_MEMINFO: Final = Path("/proc/meminfo")
_HUGETLB_POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_MFD_HUGE_SHIFT: Final = 26

# What the kernel can prove zero in one piece; 4096 on x86.
HOST_PAGE_SIZE: Final = max(PAGE_SIZE, mmap.PAGESIZE)


class Backing(Protocol):
    """Memory that is mapped and can be discarded; ranges reach it only after checks."""

    mapping: Mapping
    page_size: int
    proves: bool
    """Whether a successful `discard` proves that the range reads as zero."""
    file: FileIO | None
    file_offset: int
    """The offset in `file` of the window's first byte; pages are counted from the file's start."""

    def discard(self, offset: int, length: int) -> None:
        """Give whole pages of the window back to the host; OSError where the kernel refuses."""

    def resident(self, offset: int, length: int) -> int:
        """Return how many bytes of the range are in memory; OSError where it cannot be asked."""


class PrivateMemory:
    """Private anonymous memory, with huge pages advised."""

    proves = True
    file: FileIO | None = None
    file_offset = 0

    def __init__(self, size: int) -> None:
        """Map `size` bytes; nothing is resident until touched.

        Raises:
            OSError: the kernel refused the address space.
        """
        self.page_size = HOST_PAGE_SIZE
        self.mapping = Mapping(size)
        _advise_huge(self.mapping)

    def discard(self, offset: int, length: int) -> None:
        """Drop pages; the next access gets zero-filled ones."""
        libc.madvise(self.mapping.base + offset, length, mmap.MADV_DONTNEED)

    def resident(self, offset: int, length: int) -> int:
        """Return the bytes of the range that hold memory of their own."""
        return residency.private_resident(self.mapping.base + offset, length)


class SharedMemory:
    """A shared mapping of a part of a file that this object owns."""

    def __init__(self, file: FileIO, offset: int, size: int) -> None:
        """Map `[offset, offset + size)` of `file`, congruent to it modulo its huge pages.

        Raises:
            OSError: the file cannot be mapped shared and writable.
        """
        fd = file.fileno()
        magic, block = libc.filesystem(fd)
        huge = magic == libc.HUGETLBFS_MAGIC
        self.page_size = block if huge else HOST_PAGE_SIZE
        self.proves = magic in (libc.HUGETLBFS_MAGIC, libc.TMPFS_MAGIC)
        self.file: FileIO | None = file
        self.file_offset = offset
        self._fd = fd
        lead = offset % self.page_size
        tail = -(offset + size) % self.page_size
        alignment = max(PMD_SIZE, self.page_size)
        skew = (offset - lead) % alignment
        self.mapping = Mapping(size, alignment=alignment, skew=skew, lead=lead, tail=tail)
        self.mapping.map_file(fd, offset - lead, reserve=huge)
        if not huge:
            _advise_huge(self.mapping)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole, which every shared mapping of the file sees."""
        libc.punch_hole(self._fd, self.file_offset + offset, length)

    def resident(self, offset: int, length: int) -> int:
        """Return the bytes of the range whose pages are in memory, whoever touched them."""
        return residency.shared_resident(self.mapping.base + offset, length)


def _advise_huge(mapping: Mapping) -> None:
    # Advice: shmem heeds it only where shmem_enabled says so, and a kernel without THP
    # answers EINVAL. Neither changes what a discard proves.
    try:
        mapping.advise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        _log.debug("no transparent huge pages: %s", error)


def open_anonymous(size: int) -> Backing:
    """Return private anonymous memory."""
    return PrivateMemory(size)


def open_memfd(size: int) -> Backing:
    """Return shared memory in an unnamed file, sealed so that no peer can shrink it."""
    with _Owner(os.memfd_create("hostzero", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as owner:
        os.ftruncate(owner.file.fileno(), size)
        # A peer that shrank the file would turn our next access into a SIGBUS.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(owner.file.fileno(), fcntl.F_ADD_SEALS, seals)
        return SharedMemory(owner.keep(), 0, size)


def open_tmpfs_huge(size: int) -> Backing:
    """Return shared memory in an unnamed file on a private tmpfs with huge=always."""
    with _Owner(huge_tmpfs.open_unnamed_file()) as owner:
        os.ftruncate(owner.file.fileno(), size)
        return SharedMemory(owner.keep(), 0, size)


def open_hugetlb(size: int) -> Backing:
    """Return shared memory in 2 MiB pages from the pool that the administrator has filled."""
    flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | (PMD_SHIFT << _MFD_HUGE_SHIFT)
    try:
        fd = os.memfd_create("hostzero", flags)
    except OSError as error:
        raise BackingUnavailable(f"hugetlb: this kernel has no 2 MiB pages ({error.strerror})") from error
    with _Owner(fd) as owner:
        try:
            os.ftruncate(fd, size)
            # The mapping reserves the pages, so a pool that is too small shows here.
            return SharedMemory(owner.keep(), 0, size)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise BackingUnavailable(hugetlb_shortage(size)) from error


def open_received(fd: int, offset: int, size: int) -> Backing:
    """Return a part of a file that another process sent; `fd` is duplicated, not taken.

    Raises:
        RangeError: the part is empty, not in whole 4 KiB pages or beyond the file's end.
        OSError: the file cannot be mapped shared and writable.
    """
    if offset < 0 or size <= 0 or offset % PAGE_SIZE or size % PAGE_SIZE:
        raise RangeError(f"file range of {size:#x} bytes at {offset:#x} is not whole 4 KiB pages")
    with _Owner(os.dup(fd)) as owner:
        end = os.fstat(owner.file.fileno()).st_size
        if offset + size > end:
            raise RangeError(f"file range of {size:#x} bytes at {offset:#x} ends beyond the file ({end:#x})")
        return SharedMemory(owner.keep(), offset, size)


BACKINGS: Final[dict[str, Callable[[int], Backing]]] = {
    "anonymous": open_anonymous,
    "memfd": open_memfd,
    "tmpfs-huge": open_tmpfs_huge,
    "hugetlb": open_hugetlb,
}
"""The backings that `open_ram` knows, by name, in the order in which help texts list them."""


def physical_memory() -> int:
    """Return this machine's physical memory in bytes (MemTotal).

    Raises:
        BackingUnavailable: /proc/meminfo does not say.
    """
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    raise BackingUnavailable(f"{_MEMINFO} has no MemTotal: cannot tell how much memory this machine has")


def hugetlb_shortage(size: int, pool: Path = _HUGETLB_POOL) -> str:
    """Return the line that tells how far the pool of 2 MiB pages is from holding `size` bytes."""

    def read(name: str) -> int:
        return int((pool / name).read_text())

    needed = size // PMD_SIZE
    total, reserved = read("nr_hugepages"), read("resv_hugepages")
    # A page that is free but reserved belongs to a mapping that has not touched it yet.
    free = read("free_hugepages") - reserved
    target = total + needed - free
    return (
        f"hugetlb: {format_size(size)} needs {needed} free 2 MiB pages and the pool has {max(free, 0)} "
        f"(of {total}, {reserved} reserved): run `sysctl vm.nr_hugepages={target}` as root"
    )


class _Owner:
    # Closes a descriptor unless it was handed on, also when Ctrl-C comes in between.

    def __init__(self, fd: int) -> None:
        try:
            self.file = FileIO(fd, "r+b")
        except OSError:  # a folder: FileIO refuses it and leaves it open
            os.close(fd)
            raise
        self._kept = False

    def keep(self) -> FileIO:
        self._kept = True
        return self.file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None or not self._kept:
            self.file.close()
