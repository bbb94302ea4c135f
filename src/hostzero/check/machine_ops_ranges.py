# SPDX-License-Identifier: GPL-2.0-only
"""Operations of ranges of pages that begin and end anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero.check.inventory import BALLOON, OWNED
from hostzero.check.machine_ops import operation
from hostzero.mm.cachealias import evict
from hostzero.mm.contig import alloc_contig_frozen_range
from hostzero.mm.gfp import GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmzone import PAGEBLOCK_NR_PAGES

if TYPE_CHECKING:
    from hostzero.check.world import World

COUNTS = (3, 1, 7, 29, 100, 515, 1200)
MOST_RANGES = 3


@operation(
    weight=2,
    when=lambda world: len(world.ranges) < MOST_RANGES,
    at=65535,
    count=len(COUNTS) - 1,
    zero=1,
    free=2,
)
def take_range(world: World, at: int, count: int, zero: int, free: int) -> None:
    """A range is taken page by page that begins at a free page, perhaps one of free pages only."""
    before = world.before
    if len(world.ranges) >= MOST_RANGES or before is None:
        return
    place = before.pages.place
    starts = np.flatnonzero((place > OWNED) & (place < BALLOON))
    if not len(starts):
        return
    start = int(starts[at % len(starts)])
    end = min(start + COUNTS[count % len(COUNTS)], world.pages)
    if free % 3:
        end = start + int(np.argmax(np.append(place[start:end] == OWNED, True)))
    flags = GFP_ZERO if zero % 2 else 0
    world.unasked = not flags
    world.isolated = (start & -PAGEBLOCK_NR_PAGES, (end - 1 | PAGEBLOCK_NR_PAGES - 1) + 1)
    if not alloc_contig_frozen_range(world.mm, start, end, GFP_KERNEL | flags):
        return
    if world.mm.config.dcache_aliasing:
        evict(world.mem, start, end - start)  # the kernel sees its own lines first
    world.given(start, end - start, zeroed=bool(flags), fill=0x99)
    world.ranges.append((start, end - start))


@operation(when=lambda world: bool(world.ranges), which=MOST_RANGES - 1, count=len(COUNTS) - 1)
def give_range_back(world: World, which: int, count: int) -> None:
    """The beginning of a range is freed, or all of it."""
    if world.ranges:
        pfn, pages = world.ranges.pop(which % len(world.ranges))
        world.give_range_back(pfn, part := min(COUNTS[count % len(COUNTS)], pages))
        if part < pages:
            world.ranges.append((pfn + part, pages - part))
