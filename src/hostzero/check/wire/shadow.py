# SPDX-License-Identifier: GPL-2.0-only
"""A small guest memory with a shadow: what it should hold, beside what it holds.

Two regions touch in guest space and not on the host, a hole is behind them, one region lies far
away, and between them on the host are bytes that belong to nobody: whoever runs over the end of a
region hits those. Discards are the host's real ones, unless one is planned to fail.
"""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.wire_rings import Space
from hostzero.errors import RamError
from hostzero.ram import BACKINGS, GuestMemory, MemoryRegion, Ram
from hostzero.units import Gpa

RAM_PAGES: Final = 256

REGIONS: Final = (
    (0, 0, 96),
    (96, 160, 48),
    (256, 112, 16),
    (1 << 28, 224, 16),
)
"""Pages: the first in guest space, the first in RAM, how many."""


@functools.cache
def _pattern() -> NDArray[np.uint8]:
    # No byte is zero, so that every wiped byte shows.
    return np.random.default_rng(4).integers(1, 256, RAM_PAGES * PAGE, dtype=np.uint8)


class ShadowedMemory:
    """Guest memory and its shadow.

    Attributes:
        memory: what the device gets.
        space: its regions.
        bytes: every byte of the RAM under it, those between the regions too.
        shadow: what each of them should hold.
        discard_failed: whether a discard was made to fail since this was set to False.
    """

    def __init__(self, backing: str, granule: int) -> None:
        """Fill memory on a backing whose host drops `granule` pages in one piece."""
        self.granule = granule
        self._ram = Ram(BACKINGS[backing](RAM_PAGES * PAGE), backing)
        self.memory = GuestMemory(
            [MemoryRegion(Gpa(gpa * PAGE), self._ram, at * PAGE, n * PAGE) for gpa, at, n in REGIONS]
        )
        # Discards and the size of host pages are replaced on this one object; all else is the real one.
        self.memory.discard = self._discard  # type: ignore[method-assign]
        self.memory.page_size = self._page_size  # type: ignore[method-assign]
        self._discard_on_host = self._ram._backing.discard
        self._ram._backing.discard = self._host_call  # type: ignore[method-assign]
        self._host_refuses = False
        self.space = Space(tuple((gpa * PAGE, (gpa + n) * PAGE) for gpa, _, n in REGIONS))
        self.bytes = self._ram.array(np.uint8)
        self.bytes[:] = _pattern()
        self.shadow = _pattern().copy()
        self.words = self.bytes.view(np.uint64)
        self._shadow_words = self.shadow.view(np.uint64)
        self._differs = np.zeros(self.words.size, dtype=np.bool_)
        self.discard_failed = False
        self._discards = 0
        self._failing: dict[int, int] = {}

    def close(self) -> None:
        """Give the memory back."""
        del self.words, self.bytes
        self._ram.close()

    def offset(self, gpa: int, length: int) -> int | None:
        """Return where a range of guest space lies in RAM; None if no region holds it."""
        for first, at, count in REGIONS:
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
        """Return the words of 8 bytes, counted in RAM, that are not what they should be."""
        np.not_equal(self.words, self._shadow_words, out=self._differs)
        return np.flatnonzero(self._differs)

    def accept(self, words: NDArray[np.int64]) -> None:
        """Take what these words hold for what they should hold."""
        self._shadow_words[words] = self.words[words]

    def plan_failure(self, which: int, mode: int) -> None:
        """Have the `which`-th discard from now on fail; see the step `fail_discard`."""
        self._failing = {self._discards + max(which, 0): min(max(mode, 1), 5)}

    def _discard(self, gpa: int, length: int) -> bool:
        # The host's discard: it may fail, or fail halfway, and sees only whole pieces.
        mode = self._failing.pop(self._discards, 0)
        self._discards += 1
        size = self.granule * PAGE
        start, end = -(-gpa // size) * size, (gpa + length) // size * size
        self._host_refuses = mode == 5
        if mode:
            self.discard_failed = True
        if mode and mode != 5:
            half = start + (end - start) // (2 * size) * size
            if mode != 1 and half > start:
                GuestMemory.discard(self.memory, Gpa(start), half - start)
            if mode == 3:
                raise OSError(12, "the host has no memory")
            if mode == 4:
                raise RamError("the host cannot do that now")
            return False
        if self.granule == 1:
            return GuestMemory.discard(self.memory, Gpa(gpa), length)
        whole = start < end and GuestMemory.discard(self.memory, Gpa(start), end - start)
        return whole and (start, end) == (gpa, gpa + length)

    def _host_call(self, offset: int, length: int) -> None:
        # What the memory asks of the host's kernel, which may give up in the middle.
        if self._host_refuses:
            half = length // (2 * PAGE) * PAGE
            if half:
                self._discard_on_host(offset, half)
            raise OSError(12, "the host's kernel has no memory")
        self._discard_on_host(offset, length)

    def _page_size(self, gpa: int) -> int:
        del gpa
        return self.granule * PAGE
