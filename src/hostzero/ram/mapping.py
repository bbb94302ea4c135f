# SPDX-License-Identifier: GPL-2.0-only
"""An aligned window of this process's address space, and who frees it.

The kernel aligns large anonymous mappings to 2 MiB only since Linux 6.7, and only
some of them. So a reservation larger than the window is mapped first and the
aligned window is taken out of its middle; a file is mapped over the window with
MAP_FIXED. Python's mmap object owns the whole reservation and unmaps it, once, when
its last view is gone: an array that outlives `close` keeps its memory and never
points at unmapped addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from hostzero.ram import libc
from hostzero.units import PMD_SIZE, Hva

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class Mapping:
    """A writable window of `size` bytes at `base`, anonymous and private or over a file."""

    def __init__(
        self, size: int, *, alignment: int = PMD_SIZE, skew: int = 0, lead: int = 0, tail: int = 0
    ) -> None:
        """Reserve anonymous memory around a window.

        The reservation holds a span of `lead + size + tail` bytes whose first byte lies
        `skew` bytes past a multiple of `alignment`; the window is the `size` bytes after
        `lead`. A file that is mapped in huge pages needs addresses that agree with file
        offsets modulo the huge page, and whole huge pages at both ends.

        Raises:
            OSError: the kernel refused the address space.
        """
        self._span = lead + size + tail
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | libc.MAP_NORESERVE
        self._reservation = mmap.mmap(-1, self._span + alignment, flags=flags)
        # The temporary ctypes object is an export; it is gone at the end of the statement.
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._reservation))
        self._lead = lead
        self._skip = (skew - start) % alignment + lead
        self.size = size
        self.base = Hva(start + self._skip)

    def map_file(self, fd: int, offset: int, *, reserve: bool) -> None:
        """Map a file, from `offset` on, over the span; `reserve` as in `libc.map_shared_fixed`.

        Raises:
            OSError: mmap(2) failed.
        """
        libc.map_shared_fixed(self.base - self._lead, self._span, fd, offset, reserve=reserve)

    def advise(self, advice: int) -> None:
        """Give the kernel advice about the window (madvise(2)).

        Raises:
            OSError: madvise(2) failed.
        """
        libc.madvise(self.base, self.size, advice)

    def window(self) -> memoryview:
        """Return the window as writable bytes."""
        with memoryview(self._reservation) as whole:
            return whole[self._skip : self._skip + self.size]

    def array(self, dtype: DTypeLike) -> NDArray[Any]:
        """Return the window as an array of `dtype`, whose item size divides the window."""
        count = self.size // np.dtype(dtype).itemsize
        return np.frombuffer(self._reservation, dtype=dtype, count=count, offset=self._skip)

    def release(self) -> None:
        """Unmap now, or when the last outstanding view goes; to be called once."""
        # While somebody holds a view, close() refuses; the mmap object then lives as long as
        # that view and unmaps when it is freed.
        with contextlib.suppress(BufferError):
            self._reservation.close()
        del self._reservation
