# SPDX-License-Identifier: GPL-2.0-only
"""Operations of hugetlb: pools, mappings of huge pages, files and memfd."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from hostzero.check.machine_ops import makes_gigantic_pages, operation
from hostzero.check.machine_rows import PIN
from hostzero.check.users import HUGE_PAGES, Area, File
from hostzero.check.world_setup import GIGANTIC
from hostzero.errors import OutOfMemory
from hostzero.mm.hugetlb import alloc_hugetlb_folio_nodemask
from hostzero.mm.mmap import MAP_HUGE_SHIFT, MAP_HUGETLB, MAP_NORESERVE, MAP_SHARED, MAP_UNINITIALIZED
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE
from hostzero.mm.page_free import put_page
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.check.world import World

FLAGS = (0, MAP_NORESERVE, MAP_SHARED, MAP_SHARED | MAP_NORESERVE, MAP_UNINITIALIZED)
MOST_FILES = 3
HOLES = (1, 3, 100, 511, 512, 513, 700, 1100)
"""How many pages of 4 KiB a hole has."""
BEFORE = 100
"""How many pages of 4 KiB before a huge page's end a hole begins that is not one of whole huge pages."""


@operation(
    isolates=makes_gigantic_pages,
    weight=2,
    user=1,
    pages=2,
    flags=len(FLAGS) - 1,
    gigantic=1,
    which=5,
)
def mmap_huge(world: World, user: int, pages: int, flags: int, gigantic: int, which: int) -> None:
    """Map huge pages, of a file or of none."""
    owner, file, offset = world.users[user % 2], None, 0
    order = GIGANTIC if gigantic % 2 and world.mm.config.gigantic_order else 9
    count = 1 if order == GIGANTIC else pages % 3 + 1
    wanted = FLAGS[flags % len(FLAGS)]
    if order == GIGANTIC and world.crowded:
        return
    if which < len(world.files):
        file, order, offset = world.files[which], 9, which % 2
    world.unasked = True
    unknown = None
    if wanted == MAP_UNINITIALIZED:
        # The bit is the lowest of a size's logarithm: there is none besides it, and no file of the search.
        file, order, offset = None, HPAGE_PMD_ORDER, 0
        unknown = np.ones(count << order, dtype=np.bool_)
    else:
        wanted |= (order + 12) << MAP_HUGE_SHIFT
    with suppress(OutOfMemory):
        start = owner.process.mmap(
            count << order << 12,
            wanted | MAP_HUGETLB,
            file=file.file if file else None,
            offset=offset * HUGE_PAGES * PAGE_SIZE,
        )
        first, size = start // PAGE_SIZE, count << order
        shared = bool(wanted & MAP_SHARED)
        content = np.zeros(size, dtype=np.uint8)
        under = None if file is None else file.content[offset * HUGE_PAGES : offset * HUGE_PAGES + size]
        if shared and under is not None:
            content, under = under, None
        elif under is not None:
            content = under.copy()
        owner.areas.append(Area(first, first + size, content, 1 << order, file, shared, under, unknown))


@operation(isolates=makes_gigantic_pages, count=4, overcommit=4)
def resize_pool(world: World, count: int, overcommit: int) -> None:
    """Change how many huge pages there are, and how many more there may be."""
    world.unasked = True
    world.mm.hugetlb.set_nr_hugepages(count % 5)
    world.mm.hugetlb.set_nr_overcommit(overcommit % 5)


@operation(isolates=makes_gigantic_pages, node=1)
def take_huge_target(world: World, node: int) -> None:
    """A huge page is taken to move another one to, written, and given up: the migration fails."""
    world.unasked = True
    pfn = alloc_hugetlb_folio_nodemask(world.mem, 0, node % world.nr_nodes, 0)
    if pfn != NO_PAGE:
        world.taken(pfn, HPAGE_PMD_ORDER, zeroed=False, fill=0x66)
        put_page(world.mem, pfn, 0)


@operation(isolates=True, when=makes_gigantic_pages, count=1, overcommit=1)
def resize_gigantic_pool(world: World, count: int, overcommit: int) -> None:
    """The same of gigantic pages."""
    if world.mm.config.gigantic_order and not world.crowded:
        world.mm.hugetlb.set_nr_hugepages(count % 2, GIGANTIC)
        world.mm.hugetlb.set_nr_overcommit(overcommit % 2, GIGANTIC)


@operation(isolates=makes_gigantic_pages, when=lambda world: len(world.files) < MOST_FILES, pages=2)
def create_file(world: World, pages: int) -> None:
    """Open a file of huge pages."""
    if len(world.files) < MOST_FILES:
        world.files.append(File(world.mm.hugetlb.create_file((pages % 3 + 1) * HUGE_PAGES * PAGE_SIZE)))


@operation(
    isolates=makes_gigantic_pages,
    when=lambda world: bool(world.files),
    which=MOST_FILES - 1,
    what=5,
    first=3,
    count=1,
)
def use_file(world: World, which: int, what: int, first: int, count: int) -> None:
    """Fill holes of a file, punch one of any size, pin a page as memfd does, cut it, or close it."""
    if not world.files:
        return
    file = world.files[which % len(world.files)]
    size, count = file.file.page_size, count % 2 + 1
    with suppress(OutOfMemory):
        if what == 0:
            file.file.fallocate(first * size, count * size)
        elif what == 1:
            file.file.punch_hole(first * size, count * size)
            file.content[first * HUGE_PAGES : (first + count) * HUGE_PAGES] = 0
        elif what == PIN and len(holes := np.flatnonzero(file.file.pages == NO_PAGE)):
            world.isolates = True  # what is known of a page is not asked for there
            file.file.memfd_alloc_folio(int(holes[first % len(holes)]))
        elif what == 3:
            file.file.truncate(first * size)
            file.content[first * HUGE_PAGES :] = 0
        elif what == 5:
            start, end = max(first * HUGE_PAGES - BEFORE, 7), (first + count - 1) * HUGE_PAGES + BEFORE
            file.file.punch_hole(start * PAGE_SIZE, (end - start) * PAGE_SIZE)
            file.content[start:end] = 0
        elif what == 4:
            file.file.close()
            world.files.remove(file)


@operation(
    isolates=makes_gigantic_pages,
    when=lambda world: bool(world.files),
    which=MOST_FILES - 1,
    at=2047,
    pages=len(HOLES) - 1,
)
def punch(world: World, which: int, at: int, pages: int) -> None:
    """Punch a hole of any size anywhere in a file, also across its huge pages and its end."""
    if world.files and (file := world.files[which % len(world.files)]).file.size:
        start = at % (file.file.size // PAGE_SIZE)
        end = start + HOLES[pages % len(HOLES)]
        file.file.punch_hole(start * PAGE_SIZE, (end - start) * PAGE_SIZE)
        file.content[start:end] = 0
