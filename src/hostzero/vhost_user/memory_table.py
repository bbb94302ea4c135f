# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory out of a SET_MEM_TABLE: mapped, checked, and found by the front end's addresses.

QEMU shares one memfd in several regions (below and above the hole at 4 GiB), each with a
descriptor of its own for the same file. That is fine as long as the parts of the file are
disjoint. Where they are not, one byte of memory would have two guest addresses, and a discard of
a page would clear another one: such a table is refused.

The front end has to keep its files as long as they are. A file that shrinks under the mapping
kills the process that touches it (SIGBUS), and nothing in Python can prevent that; QEMU's memfd
is sealed against it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

from hostzero.errors import MessageError, RamError
from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.vhost_user.payloads import MemTable, Region
from hostzero.vhost_user.protocol import ErrorKind


class _FilePart(NamedTuple):
    device: int
    inode: int
    start: int
    size: int


class MappedTable:
    """Guest memory that a front end shares, until `close`.

    Attributes:
        memory: it, by guest physical addresses.
        regions: the table as it came.
    """

    def __init__(self, table: MemTable, fds: Sequence[int]) -> None:
        """Map every region; the descriptors stay the caller's, one for each region.

        Raises:
            MessageError: a region is not in whole pages, overlaps another one in guest space, in
                the front end's or in its file, ends beyond its file, or cannot be mapped shared
                and writable. Nothing stays mapped.
        """
        self.regions = table.regions
        _check_user_overlap(table.regions)
        _check_file_overlap(table.regions, fds)
        self._rams: list[Ram] = []
        try:
            mapped = []
            for region, fd in zip(table.regions, fds, strict=True):
                _check_pages(region)
                ram = Ram.from_fd(fd, region.mmap_offset, region.size)
                self._rams.append(ram)
                mapped.append(MemoryRegion(Gpa(region.gpa), ram, 0, region.size))
            self.memory = GuestMemory(mapped)
        except MessageError:
            self.close()
            raise
        except (RamError, OSError, OverflowError, ValueError) as error:
            self.close()
            raise MessageError(ErrorKind.MEMORY, str(error)) from error

    @property
    def size(self) -> int:
        """Bytes of all regions together."""
        return sum(region.size for region in self.regions)

    def allocated(self) -> int:
        """Return the bytes of memory that the files behind the regions hold, each file once."""
        blocks = {}
        for ram in self._rams:
            fd = ram.fileno
            if fd is not None:
                status = os.fstat(fd)
                blocks[status.st_dev, status.st_ino] = status.st_blocks * 512
        return sum(blocks.values())

    def to_gpa(self, user: int) -> Gpa:
        """Return the guest physical address of an address of the front end.

        Raises:
            MessageError: no region holds it.
        """
        for region in self.regions:
            if region.user <= user < region.user + region.size:
                return Gpa(region.gpa + (user - region.user))
        raise MessageError(ErrorKind.MEMORY, f"the address {user:#x} is in no memory region")

    def close(self) -> None:
        """Unmap everything; nobody may use `memory` any more. A second call does nothing."""
        rams, self._rams = self._rams, []
        for ram in rams:
            ram.close()


def _check_pages(region: Region) -> None:
    if region.gpa % PAGE_SIZE or region.size % PAGE_SIZE or region.mmap_offset % PAGE_SIZE:
        raise MessageError(
            ErrorKind.MEMORY,
            f"the region of {region.size:#x} bytes at {region.gpa:#x} (file offset "
            f"{region.mmap_offset:#x}) is not whole pages of {PAGE_SIZE} bytes",
        )


def _check_user_overlap(regions: Sequence[Region]) -> None:
    in_order = sorted(regions, key=lambda region: region.user)
    for below, above in itertools.pairwise(in_order):
        if below.user + below.size > above.user:
            raise MessageError(
                ErrorKind.MEMORY,
                f"the regions at {below.gpa:#x} and {above.gpa:#x} overlap in the front end's space",
            )


def _check_file_overlap(regions: Sequence[Region], fds: Sequence[int]) -> None:
    parts = []
    for region, fd in zip(regions, fds, strict=True):
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise MessageError(ErrorKind.DESCRIPTORS, f"a memory descriptor: {error.strerror}") from error
        parts.append(_FilePart(status.st_dev, status.st_ino, region.mmap_offset, region.size))
    for below, above in itertools.pairwise(sorted(parts)):
        if below[:2] == above[:2] and below.start + below.size > above.start:
            raise MessageError(
                ErrorKind.MEMORY,
                f"two regions share bytes of their file at {above.start:#x}: a page would have two addresses",
            )
