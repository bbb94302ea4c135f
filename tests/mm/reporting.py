# SPDX-License-Identifier: GPL-2.0-only
"""Guests with free blocks in known places, for the tests of page reporting."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm.mmzone import MIGRATE_MOVABLE
from tests.mm.guest import booted, dirty, free_lists
from tests.mm.processes import Entries, Image, image, occupy, release, release_blocks

if TYPE_CHECKING:
    from tests.mm.conftest import Boot

# Blocks of order 4 that cannot merge, in two pageblocks; the first of each list is met first.
SCATTERED = [(1024 + 32 * i, 4) for i in range(16)] + [(1536 + 32 * i, 4) for i in range(16)]


def movable(mm: MemoryManager, order: int = 4) -> list[int]:
    return free_lists(mm.mem).get((0, order, MIGRATE_MOVABLE), [])


def with_blocks(mm: MemoryManager, blocks: Entries) -> MemoryManager:
    """Leave these blocks free, dirty, and single pages around them, so that both zones can spare a batch."""
    occupy(mm)
    for pfn, order in blocks:
        dirty(mm, pfn, order)
    release(mm, [*range(1, 128, 2), *(pfn + 16 + odd for pfn, _ in SCATTERED[16:] for odd in (1, 3, 5))])
    release_blocks(mm, blocks)
    return mm


@functools.cache
def scattered_image() -> Image:
    # Made once: taking all memory page by page is slow without the compiler.
    with booted() as mm:
        return image(with_blocks(mm, SCATTERED))


def two_zones(boot: Boot, **config: object) -> MemoryManager:
    return boot(8, zones=(ZoneSpec("DMA32", 0, 1024), ZoneSpec("Normal", 1024, 2048)), **config)
