# SPDX-License-Identifier: GPL-2.0-only
"""Guest RAM on the host: one mapping, its bytes, and proofs that a part of it is zero.

A proof is the only thing that a zero claim may rest on. It names the bytes that the
host's kernel has, by a documented effect of a call that succeeded, replaced by
zeroes. Where a call fails, or is only known to free memory, nothing is proven.
"""

from __future__ import annotations

import contextlib
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from hostzero.errors import BackingUnavailable, RamError, RangeError, UsageError
from hostzero.ram.backing import BACKINGS, HOST_PAGE_SIZE, Backing, open_received, physical_memory
from hostzero.units import PAGE_SIZE, PMD_SIZE, Hva, format_size

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class ZeroProof(NamedTuple):
    """The bytes `[offset, offset + length)` of a region read as zero until somebody writes.

    `length` 0 proves nothing; `error` then says what the kernel refused, if it was asked.
    """

    offset: int
    length: int
    error: OSError | None = None

    def covers(self, offset: int, length: int) -> bool:
        """Whether every byte of a range that is not empty is proven zero."""
        return length > 0 and self.offset <= offset and offset + length <= self.offset + self.length


class Ram:
    """One contiguous piece of guest RAM.

    It closes like a file. Views and arrays taken from it may outlive `close`; the memory
    is unmapped with the last of them. Closing while another thread discards is a race
    that the caller must exclude.

    Attributes:
        size: bytes.
        base: address of the first byte; a multiple of 2 MiB, unless `from_fd` made it.
        backing: the name given to `open_ram`, or "fd".
        page_size: the smallest piece, in bytes, that the host can discard and prove zero.
    """

    def __init__(self, backing: Backing, name: str) -> None:
        """Take over a mapped backing; `open_ram` and `from_fd` are the usual ways here."""
        self._backing = backing
        self._window: memoryview | None = backing.mapping.window()
        self.size = backing.mapping.size
        self.base: Hva = backing.mapping.base
        self.backing = name
        self.page_size = backing.page_size

    @classmethod
    def from_fd(cls, fd: int, offset: int, size: int) -> Ram:
        """Map a part of a file that another process shares (a vhost-user memory region).

        `fd` stays the caller's; `offset` and `size` are multiples of 4096. The base is
        congruent to `offset` modulo 2 MiB, so that huge pages of the file stay huge here.
        Proofs are given on shmem and hugetlbfs only, in whole pages of the file.

        Raises:
            RangeError: the part is empty, unaligned or beyond the file's end.
            BackingUnavailable: the file cannot be mapped shared and writable.
        """
        try:
            return cls(open_received(fd, offset, size), "fd")
        except OSError as error:
            raise BackingUnavailable(f"fd: cannot map {format_size(size)}: {error.strerror}") from error

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._window is None

    @property
    def buffer(self) -> memoryview:
        """The whole region as writable bytes.

        Raises:
            RamError: the region is closed.
        """
        if self._window is None:
            raise self._closed_error()
        return self._window

    @property
    def fileno(self) -> int | None:
        """The descriptor of the file behind the region, to be shared; None on anonymous memory.

        Raises:
            RamError: the region is closed.
        """
        if self._window is None:
            raise self._closed_error()
        return None if self._backing.file is None else self._backing.file.fileno()

    def array(self, dtype: DTypeLike) -> NDArray[Any]:
        """Return the whole region as a one-dimensional array, without copying.

        Raises:
            RamError: the region is closed, or its size is not a multiple of the item size.
        """
        if self._window is None:
            raise self._closed_error()
        item = np.dtype(dtype).itemsize
        if item == 0 or self.size % item:
            raise RamError(f"{self.size} bytes of guest memory do not divide into items of {item} bytes")
        return self._backing.mapping.array(dtype)

    def discard(self, offset: int, length: int) -> ZeroProof:
        """Give a range back to the host and return what is proven zero afterwards.

        `offset` and `length` are bytes, multiples of 4096. Where the host's pages are larger,
        the range is rounded inward to whole ones first: what a partly covered page holds
        stays, and is not proven.

        Raises:
            RangeError: the range is empty, unaligned or not inside the region; no system
                call was made.
            RamError: the region is closed.
        """
        offset, length = self._checked(offset, length, PAGE_SIZE)
        first = self._backing.file_offset
        start = _round_up(first + offset, self.page_size) - first
        end = _round_down(first + offset + length, self.page_size) - first
        if start >= end:
            return ZeroProof(offset, 0)
        try:
            self._backing.discard(start, end - start)
        except OSError as error:
            # The call may have done part of its work; which part, it does not say.
            return ZeroProof(offset, 0, error)
        return ZeroProof(start, end - start if self._backing.proves else 0)

    def resident(self, offset: int = 0, length: int | None = None) -> int:
        """Return how many bytes of a range are in the host's memory, touching none of them.

        `offset` and `length` are multiples of the host's page; the default is the whole
        region. `hostzero.ram.residency` says what is counted on which backing.

        Raises:
            RangeError: the range is empty, unaligned or not inside the region.
            RamError: the region is closed, or the kernel does not answer.
        """
        length = self.size - offset if length is None else length
        offset, length = self._checked(offset, length, HOST_PAGE_SIZE)
        try:
            return self._backing.resident(offset, length)
        except OSError as error:
            raise RamError(f"cannot ask what is resident: {error}") from error

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        window, self._window = self._window, None
        if window is None:
            return
        # An array made from `buffer` refuses this, and keeps the mapping.
        with contextlib.suppress(BufferError):
            window.release()
        del window
        if self._backing.file is not None:
            self._backing.file.close()
        self._backing.mapping.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Ram {format_size(self.size)} {self.backing} at {self.base:#x}{state}>"

    def _checked(self, offset: int, length: int, unit: int) -> tuple[int, int]:
        if self._window is None:
            raise self._closed_error()
        # index() turns a NumPy integer, whose arithmetic could wrap, into an exact one.
        offset, length = index(offset), index(length)
        if length <= 0:
            raise RangeError(f"range of {length} bytes at offset {offset:#x} is empty")
        if offset % unit or length % unit:
            raise RangeError(
                f"range of {length:#x} bytes at offset {offset:#x} is not whole {unit}-byte pages"
            )
        if offset < 0 or length > self.size - offset:
            raise RangeError(
                f"range of {length:#x} bytes at offset {offset:#x} leaves the region of {self.size:#x} bytes"
            )
        return offset, length

    def _closed_error(self) -> RamError:
        return RamError(f"this guest memory ({format_size(self.size)}, {self.backing}) is closed")


def open_ram(size: int, backing: str = "anonymous") -> Ram:
    """Return new guest RAM that reads as zero: `size` bytes at an address aligned to 2 MiB.

    `backing` is one of `BACKINGS`. Host memory is taken only as the RAM is touched; hugetlb
    reserves all of it at once.

    Raises:
        UsageError: `size` is not a positive multiple of 2 MiB, or `backing` is unknown.
        BackingUnavailable: this machine lacks the backing, or not enough of it.
    """
    if backing not in BACKINGS:
        raise UsageError(f"unknown memory backing {backing!r}: choose one of {', '.join(BACKINGS)}")
    if size <= 0:
        raise UsageError(f"guest memory of {size} bytes is too small: use 2M or more")
    if size % PMD_SIZE:
        lower, upper = _round_down(size, PMD_SIZE), _round_up(size, PMD_SIZE)
        near = f"{format_size(lower)} or {format_size(upper)}" if lower else format_size(upper)
        raise UsageError(f"guest memory of {size} bytes is not a multiple of 2M: use {near}")
    total = physical_memory()
    if size > total:
        raise BackingUnavailable(
            f"{backing}: {format_size(size)} of guest memory is more than this machine's physical memory: "
            f"use {format_size(_round_down(total, PMD_SIZE))} or less"
        )
    try:
        return Ram(BACKINGS[backing](size), backing)
    except OSError as error:
        raise BackingUnavailable(
            f"{backing}: cannot map {format_size(size)} of guest memory: {error.strerror}"
        ) from error


def _round_down(value: int, unit: int) -> int:
    return value - value % unit


def _round_up(value: int, unit: int) -> int:
    return value + -value % unit
