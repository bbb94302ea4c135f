# SPDX-License-Identifier: GPL-2.0-only
"""Operations of memory that breaks, and is repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero.check.inventory import DEFERRED, FREE, PARKED
from hostzero.check.machine_ops import operation
from hostzero.mm.memory_failure import MF_RECOVERED

if TYPE_CHECKING:
    from hostzero.check.world import World

MOST_BROKEN = 8
RUBBISH = 0xE7


@operation(isolates=True, at=65535, whose=6)
def break_page(world: World, at: int, whose: int) -> None:
    """The hardware reports a page: any, a process's, one known to be zero, one that waits, the kernel's."""
    before = world.before
    if len(world.broken) >= MOST_BROKEN or before is None:
        return
    candidates = np.arange(1, world.pages)
    if whose == 1:
        candidates = np.flatnonzero(world.mem.mem_map["mapping"][: world.pages])
    elif whose == 2:
        candidates = np.flatnonzero(before.pages.zeroed & (before.pages.place >= FREE))
    elif whose == 3:
        candidates = np.flatnonzero(before.pages.place == PARKED)
    elif whose in {5, 6}:
        waiting = np.isin(before.pages.place, (PARKED, DEFERRED) if whose == 5 else DEFERRED)
        candidates = np.flatnonzero(waiting & (before.pages.zeroed | (whose == 6)))
    elif whose == 4:
        candidates = np.array([pfn + i for pfn, order, _ in world.blocks for i in range(1 << order)])
    if not len(candidates):
        return
    pfn = int(candidates[at % len(candidates)])
    if pfn in world.broken:
        return
    user = world.mapped_at(pfn)
    place = int(before.pages.place[pfn])
    result = world.mm.memory_failure.memory_failure(pfn)
    world.broken.append(pfn)
    if user is not None and result == MF_RECOVERED:
        world.lose(*user)
    if result == MF_RECOVERED and place in {FREE, PARKED}:
        # What the page holds from now on, nobody knows; nor is its block a place to trust.
        head, order = int(before.pages.head[pfn]), int(before.pages.order[pfn])
        world.host.owned(head, 1 << order)
        world.bytes_of(pfn, 0)[:] = RUBBISH


@operation(isolates=True, when=lambda world: bool(world.broken), which=MOST_BROKEN - 1)
def repair_page(world: World, which: int) -> None:
    """A broken page is taken back into use."""
    if world.broken:
        pfn = world.broken[which % len(world.broken)]
        if world.mm.memory_failure.unpoison_memory(pfn):
            world.broken.remove(pfn)
