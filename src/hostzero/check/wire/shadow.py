# SPDX-License-Identifier: GPL-2.0-only
"""A small guest memory with a shadow: what it should hold, beside what it holds.

A hole is behind two regions that touch in guest space, one region lies far away, and between them
on the host are bytes that belong to nobody: whoever runs over the end of a region hits those.
Discards are the host's real ones, unless they are planned to fail.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.wire_rings import Space
from hostzero.errors import RamError, UsageError
from hostzero.ram import BACKINGS, GuestMemory, MemoryRegion, Ram
from hostzero.units import Gpa

RAM_PAGES: Final = 256

_Regions = tuple[tuple[int, int, int], ...]

REGIONS: Final[_Regions] = (
    (0, 0, 96),
    (96, 160, 48),
    (256, 112, 16),
    (1 << 28, 224, 16),
)
"""Pages: the first in guest space, the first on the host, how many."""

SHAPES: Final[tuple[_Regions, ...]] = (
    REGIONS,
    # No region begins where a large host page does, in guest space and on the host alike.
    ((0, 3, 96), (96, 165, 48), (256, 113, 16), (1 << 28, 226, 16)),
    # Two regions touch on the host too, and a third one is before them there.
    ((0, 20, 96), (96, 116, 48), (256, 4, 16), (1 << 28, 200, 16)),
)
"""Where the same guest space may lie on the host."""

RECEIVED: Final = "received"
"""The backing whose regions are parts of one file of somebody else, each mapped by itself."""


@functools.cache
def _pattern() -> NDArray[np.uint8]:
    # No byte is zero, so that every wiped byte shows.
    return np.random.default_rng(4).integers(1, 256, RAM_PAGES * PAGE, dtype=np.uint8)


class ShadowedMemory:
    """Guest memory and its shadow.

    Attributes:
        memory: what the device gets.
        space: its regions.
        bytes: every byte of the host's memory under it, those between the regions too.
        shadow: what each of them should hold.
        discard_failed: whether a discard failed since this was set to False.
    """

    def __init__(self, backing: str, granule: int, shape: int = 0, *, proves: bool = True) -> None:
        """Fill memory on a backing whose host drops `granule` pages in one piece.

        Args:
            backing: one of `BACKINGS`, or `RECEIVED`.
            granule: pages in a host page.
            shape: which of `SHAPES` it has.
            proves: whether a discard that the host does is a proof; a host without proof forgets
                every other page.
        """
        self.granule = granule
        self.regions = SHAPES[shape % len(SHAPES)]
        self._proves = proves
        self._rams: list[Ram] = []
        self._file: mmap.mmap | None = None
        places = self._receive() if backing == RECEIVED else self._open(backing)
        self.memory = GuestMemory(
            [
                MemoryRegion(Gpa(gpa * PAGE), ram, offset, n * PAGE)
                for (gpa, _, n), (ram, offset) in zip(self.regions, places, strict=True)
            ]
        )
        # Discards are replaced on this one object; all else is the real one.
        self.memory.discard = self._discard  # type: ignore[method-assign]
        self._host_refuses = False
        self.space = Space(
            tuple((gpa * PAGE, (gpa + n) * PAGE) for gpa, _, n in self.regions),
            tuple(at * PAGE for _, at, _ in self.regions),
        )
        self.bytes[:] = _pattern()
        self.shadow = _pattern().copy()
        self.words = self.bytes.view(np.uint64)
        self._shadow_words = self.shadow.view(np.uint64)
        self._differs = np.zeros(self.words.size, dtype=np.bool_)
        self.discard_failed = False
        self._discards = 0
        self._failing: dict[int, int] = {}
        self._stuck = range(0)

    def close(self) -> None:
        """Give the memory back."""
        del self.words, self.bytes
        for ram in self._rams:
            ram.close()
        if self._file is not None:
            self._file.close()

    def _open(self, backing: str) -> list[tuple[Ram, int]]:
        # One piece of memory, of which the regions are parts.
        if backing not in BACKINGS:
            raise UsageError(f"the wire knows no backing {backing!r}")
        ram = Ram(BACKINGS[backing](RAM_PAGES * PAGE), backing)
        self.bytes = ram.array(np.uint8)
        self._watch(ram, 0)
        return [(ram, at * PAGE) for _, at, _ in self.regions]

    def _receive(self) -> list[tuple[Ram, int]]:
        # A file that is larger than all regions; what lies between them is seen through a mapping of its own.
        fd = os.memfd_create("hostzero-check", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, RAM_PAGES * PAGE)
            self._file = mmap.mmap(fd, RAM_PAGES * PAGE)
            self.bytes = np.frombuffer(self._file, dtype=np.uint8)
            for _, at, n in self.regions:
                self._watch(Ram.from_fd(fd, at * PAGE, n * PAGE), at)
        finally:
            os.close(fd)
        return [(ram, 0) for ram in self._rams]

    def _watch(self, ram: Ram, first: int) -> None:
        # The size of host pages and what the kernel is asked for are replaced on this one object.
        self._rams.append(ram)
        ram.page_size = self.granule * PAGE
        backing = ram._backing
        backing.proves = self._proves
        on_host = backing.discard

        def host_call(offset: int, length: int) -> None:
            self._host_call(on_host, first, offset, length)

        backing.discard = host_call  # type: ignore[method-assign]

    def offset(self, gpa: int, length: int) -> int | None:
        """Return where a range of guest space lies on the host; None if no region holds it."""
        for first, at, count in self.regions:
            start = gpa - first * PAGE
            if start >= 0 and start + length <= count * PAGE:
                return at * PAGE + start
        return None

    def write(self, gpa: int, data: bytes) -> None:
        """Write as the guest, to the shadow too; outside its memory nothing is written."""
        at = self.offset(gpa, len(data))
        if at is not None:
            raw = np.frombuffer(data, dtype=np.uint8)
            self.bytes[at : at + len(data)] = raw
            self.shadow[at : at + len(data)] = raw

    def read(self, gpa: int, length: int) -> bytes:
        """Return what memory holds."""
        at = self.offset(gpa, length)
        assert at is not None, "the model reads only what it has found to be in memory"
        return self.bytes[at : at + length].tobytes()

    def read_before(self, gpa: int, length: int) -> bytes:
        """Return what memory held when it was last accepted."""
        at = self.offset(gpa, length)
        assert at is not None, "the model reads only what it has found to be in memory"
        return self.shadow[at : at + length].tobytes()

    def pattern(self, pfn: int) -> bytes:
        """Return bytes without a zero for one page, other ones for each."""
        at = pfn * 97 % RAM_PAGES * PAGE
        return _pattern()[at : at + PAGE].tobytes()

    def changed(self) -> NDArray[np.int64]:
        """Return the words of 8 bytes, counted on the host, that are not what they should be."""
        np.not_equal(self.words, self._shadow_words, out=self._differs)
        return np.flatnonzero(self._differs)

    def accept(self, words: NDArray[np.int64]) -> None:
        """Take what these words hold for what they should hold."""
        self._shadow_words[words] = self.words[words]

    def plan_failure(self, which: int, mode: int) -> None:
        """Have the `which`-th discard from now on fail; see the step `fail_discard`."""
        self._failing = {self._discards + max(which, 0): min(max(mode, 1), 5)}

    def plan_stuck(self, page: int, count: int) -> None:
        """Have the host fail, until told otherwise, at `count` pages of guest space; see the step `stuck`."""
        at = self.offset(page * PAGE, PAGE)
        self._stuck = range(0) if at is None else range(at // PAGE, at // PAGE + max(count, 0))

    def _discard(self, gpa: int, length: int) -> bool:
        # The host's discard: it may fail, or fail halfway.
        mode = self._failing.pop(self._discards, 0)
        self._discards += 1
        self._host_refuses = mode == 5
        if mode or not self._proves:
            self.discard_failed = True
        if mode and mode != 5:
            half = length // (2 * PAGE) * PAGE
            if mode != 1 and half:
                GuestMemory.discard(self.memory, Gpa(gpa), half)
            if mode == 3:
                raise OSError(12, "the host has no memory")
            if mode == 4:
                raise RamError("the host cannot do that now")
            return False
        return GuestMemory.discard(self.memory, Gpa(gpa), length)

    def _host_call(self, on_host: Callable[[int, int], None], first: int, offset: int, length: int) -> None:
        # What the memory asks of the host's kernel, which may give up in the middle, or do less than it says.
        pages = range(first + offset // PAGE, first + (offset + length) // PAGE)
        if not self._proves:
            for page in pages[::2]:
                on_host((page - first) * PAGE, PAGE)
            return
        done = len(pages)
        stuck = next((page - pages[0] for page in pages if page in self._stuck), done)
        fails = self._host_refuses or stuck < done
        if fails:
            done = done // 2 if self._host_refuses else stuck
        if done:
            on_host(offset, done * PAGE)
        if fails:
            self.discard_failed = True
            raise OSError(12, "the host's kernel has no memory")
