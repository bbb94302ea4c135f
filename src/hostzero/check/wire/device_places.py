# SPDX-License-Identifier: GPL-2.0-only
"""Where a hostile guest puts things: pages for requests, rings across page borders, broken addresses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.device_steps import RINGS_AT
from hostzero.check.wire.shadow import REGIONS, SHAPES

ARRAYS_AT: Final = 48 * PAGE
"""Where page numbers are written: 8 pages of them."""

ANSWERS_AT: Final = 56 * PAGE
"""Where bitmaps go, and other small buffers: 8 pages."""

_TOP: Final = 1 << 64

# Pages for requests: the first, how many. Arrays, answers and the usual rings lie between them.
_FREE: Final = ((0, 40), (0, 40), (72, 24), (96, 48), (256, 16), (1 << 28, 16))

# Where rings may lie that are not in their usual pages: the first page, how many.
_RING_ROOM: Final = ((69, 27), (2, 40), (98, 40), (256, 16), (1 << 28, 16))


class Places:
    """Draws places; requests that are drawn one after the other meet in the same pages."""

    def __init__(self, rng: random.Random) -> None:
        """Draw from `rng`."""
        self._random = rng
        self._shape = 0
        self._recent: list[int] = []
        self._rings: list[int] = []

    def forget(self, shape: int = 0) -> None:
        """Begin a new episode, on memory of a shape."""
        self._shape = shape
        self._recent = []
        self._rings = []

    def page(self) -> int:
        """Return a page for a request: seldom one of arrays or answers, now and then one of a ring."""
        rng = self._random
        if self._rings and rng.random() < 0.2:
            return max(rng.choice(self._rings) + rng.choice([-1, 0, 0, 0, 1]), 0)
        if self._recent and rng.random() < 0.5:
            # Requests must meet: the same eight pages again, or others of them.
            return rng.choice(self._recent) + rng.randrange(8)
        first, count = rng.choice(_FREE)
        page = first + rng.choice([rng.randrange(count), count - 1 - rng.randrange(3)])
        self._recent = [page - page % 8, *self._recent[:2]]
        return page

    def piece(self, page: int) -> int:
        """Return the first of the eight pages around one that a host may drop in one piece."""
        for first, at, count in SHAPES[self._shape]:
            if first <= page < first + count:
                return max(page - (at + page - first) % 8, first)
        return page

    def rings(self, sizes: Sequence[int]) -> list[int]:
        """Return three addresses for each ring, anywhere that the specification allows.

        Many parts lie across the border of two pages, some so that only the event index is behind it.
        """
        rng = self._random
        first, count = rng.choice(_RING_ROOM)
        end = (first + count) * PAGE
        at = first * PAGE + rng.choice([0, 16, 2048, PAGE - 16])
        # Close together, or so far apart that many a page holds the end of one part and nothing else.
        gaps = rng.choice([(0, 0, 2, 64, 1024), (0, 2, PAGE)])
        addresses: list[int] = []
        self._rings = []
        for size in sizes:
            order = [0, 1, 2]
            rng.shuffle(order)
            parts = [0, 0, 0]
            for part in order:
                length, align = ((16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4))[part]
                at += rng.choice(gaps)
                if rng.random() < 0.6:
                    # This many bytes of it are in the next page.
                    behind = rng.choice([2, 2, 4, 16, length // 2])
                    at = max(at, -(-(at + length) // PAGE) * PAGE + behind - length)
                at += -at % align
                if at + length > end:
                    return addresses
                parts[part] = at
                self._rings += range(at // PAGE, (at + length - 1) // PAGE + 1)
                at += length
            addresses += parts
        return addresses

    def usual_rings(self, count: int) -> None:
        """Remember that the rings lie one a page."""
        self._rings = [RINGS_AT + index for index in range(count)]

    def address(self, near: int) -> int:
        """Return an address that is nearly right, or at an edge of something."""
        rng = self._random
        kind = rng.random()
        if kind < 0.4:
            return max(near + rng.choice([-PAGE, -2048, -1, 1, 2, 4, 16, 2048, PAGE]), 0)
        if kind < 0.7:
            first, _, count = rng.choice(REGIONS)
            edge = rng.choice([first, first + count]) * PAGE
            return max(edge + rng.choice([-PAGE, -16, -1, 0, 1, PAGE]), 0)
        if kind < 0.85:
            return rng.choice(
                [0, _TOP - 1, _TOP - PAGE, _TOP - 16, 1 << 63, (1 << 63) - PAGE, 1 << 32, 1 << 52]
            )
        page = rng.choice(self._rings) if self._rings else RINGS_AT
        return page * PAGE + rng.choice([0, 16, 1024, 2048, 2052, PAGE - 4])
