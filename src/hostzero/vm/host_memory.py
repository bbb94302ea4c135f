# SPDX-License-Identifier: GPL-2.0-only
"""A running guest's memory as the host has it: how much of it is backed, and with which bytes.

QEMU keeps guest memory in a memfd. It is opened once more through ``/proc/PID/fd`` and only
read, with pread(2): reading a hole through a mapping would allocate the page that it looks at.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hostzero.errors import VmError
from hostzero.units import PAGE_SIZE

_NAME: Final = "memfd:memory-backend-memfd"
_CHUNK: Final = 4 << 20


class HostMemory:
    """The memfd behind a guest's memory."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor."""
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    @classmethod
    def of(cls, pid: int, root: Path = Path("/proc")) -> Self:
        """Open the memory of the QEMU with this process id.

        One memfd may be open several times; it is one inode.

        Raises:
            VmError: it has none, more than one, or may not be looked at.
        """
        found = {}
        try:
            for link in (root / str(pid) / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                    if _NAME in str(link.readlink()):
                        found[link.stat().st_ino] = link
        except OSError as error:
            raise VmError(f"cannot look at the memory of process {pid}: {error.strerror}") from error
        if len(found) != 1:
            raise VmError(f"process {pid} has {len(found)} memfds for guest memory, not one")
        (link,) = found.values()
        return cls(os.open(link, os.O_RDONLY | os.O_CLOEXEC))

    def backed(self) -> int:
        """Return the bytes of guest memory that the host has backed with memory."""
        return os.fstat(self._descriptor).st_blocks * 512

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of guest memory; a hole reads as zero and stays a hole."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise VmError(f"guest memory ends before {offset:#x} + {size:#x}")
        return data

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield offset and length of each backed range (SEEK_DATA, SEEK_HOLE)."""
        end = 0
        while True:
            try:
                start = os.lseek(self._descriptor, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # nothing but a hole up to the end
                raise
            end = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            yield start, end - start

    def pages_with(self, content: bytes) -> set[int]:
        """Return the numbers of the backed pages (offset / 4096) with exactly this content."""
        if len(content) != PAGE_SIZE:
            raise ValueError("a page has 4096 bytes")
        pages = set()
        for start, length in self.extents():
            for offset in range(start, start + length, _CHUNK):
                data = self.read(offset, min(_CHUNK, start + length - offset))
                at = data.find(content)
                while at >= 0:
                    if at % PAGE_SIZE == 0:
                        pages.add((offset + at) // PAGE_SIZE)
                        at += PAGE_SIZE - 1
                    at = data.find(content, at + 1)
        return pages

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
