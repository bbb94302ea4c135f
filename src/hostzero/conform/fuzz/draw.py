# SPDX-License-Identifier: GPL-2.0-only
"""Numbers with a history: those near a limit, those that wrap, and sometimes any."""

from __future__ import annotations

from random import Random
from typing import Final

from hostzero.conform.fuzz.arena import DATA_PAGES, DATA_PFN, END_PFN, LOW_PAGES, Arena
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

_EDGES: Final = (0, 1, 2, 3, 4, 5, 7, 8, 127, 128, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097)
_LENGTHS: Final = (
    *(0, 1, 3, 4, 5, 8, 10, 511, 512, 1024, 2048, 4095, 4096, 4097, 8192),
    *(1 << 20, 2 << 20, 4 << 20, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 4096, (1 << 32) - 1),
)


def number(rng: Random, bits: int) -> int:
    """Return a number of so many bits that code has been wrong about."""
    top = 1 << bits
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(_EDGES) % top
    if kind == 1:
        return (1 << rng.randrange(bits)) - rng.randrange(2)
    if kind == 2:
        return (top - 1 - rng.choice(_EDGES)) % top
    if kind == 3:
        return rng.randrange(min(8, top))
    return rng.randrange(top)


def address(rng: Random, arena: Arena) -> int:
    """Return a guest address: of a page, within one, at the end of a region, or nowhere."""
    kind = rng.randrange(8)
    page = rng.randrange(DATA_PFN, END_PFN) << PAGE_SHIFT
    if kind < 3:
        return page
    if kind == 3:
        return page + rng.choice((1, 4, 16, 2048, 4092, 4095))
    if kind == 4:
        return arena.low + rng.randrange(LOW_PAGES * PAGE_SIZE)
    if kind == 5:
        edge = rng.choice(
            (DATA_PFN << PAGE_SHIFT, DATA_PFN + DATA_PAGES << PAGE_SHIFT, END_PFN << PAGE_SHIFT)
        )
        return edge + rng.choice((-PAGE_SIZE, -4, -1, 0, 1, PAGE_SIZE))
    if kind == 6:
        return number(rng, 64)
    return (1 << 64) - rng.choice((1, 4, 16, 4096, 1 << 20))


def length(rng: Random) -> int:
    """Return a length of a descriptor."""
    return rng.choice(_LENGTHS) if rng.random() < 0.8 else PAGE_SIZE * rng.randrange(1, 64)


def pfns(rng: Random, count: int) -> list[int]:
    """Return page numbers: of DATA and FAR, around their ends, 0, and any."""
    kind = rng.randrange(5)
    if kind == 0:
        return [0] * count
    if kind == 1:
        first = rng.randrange(DATA_PFN - 8, END_PFN)
        return [first + n for n in range(count)]
    if kind == 2:
        return [rng.randrange(DATA_PFN, END_PFN) for _ in range(count)]
    if kind == 3:
        # What a driver sends that fills its table with 64-bit numbers.
        return [rng.randrange(DATA_PFN, END_PFN) if n % 2 == 0 else 0 for n in range(count)]
    return [number(rng, 32) for _ in range(count)]
