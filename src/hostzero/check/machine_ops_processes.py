# SPDX-License-Identifier: GPL-2.0-only
"""Operations of processes: mapping, faulting, writing, giving back, swapping out, ending."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from hostzero.check.machine_ops import anything_mapped, areas, operation, some_pages, span, tolerate
from hostzero.check.users import Area
from hostzero.mm.mempolicy import MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_PREFERRED
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MAP_FIXED,
    MAP_UNINITIALIZED,
)
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.check.users import User
    from hostzero.check.world import World

SIZES = (1, 3, 17, 64, 512, 1100)
EACH_OTHER = -1
"""Each page is full of another byte."""
BYTES = (0x11, 0, 7, 0xFF, EACH_OTHER)
ADVICE = (MADV_PAGEOUT, MADV_PAGEOUT, MADV_HUGEPAGE, MADV_NOHUGEPAGE)
POLICIES = (MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE)
HUGE, UNINITIALIZED = 4, 5
GAPS = (2, 3, 8)
THINNED = 1024
LEFT = (4, 16, 64, 300)
MOST_AREAS = 24
LIMITS = (None, 0, 5, 600)


def fill_pages(user: User, area: Area, first: int, end: int, byte: int) -> None:
    """Have a process write, and note what it wrote."""
    if byte == EACH_OTHER:
        if tolerate(lambda: user.process.madvise(*span(first, end), MADV_POPULATE_WRITE)):
            content = (np.arange(first, end) % 251 + 3).astype(np.uint8)
            for page, value in enumerate(content.tolist(), first):
                user.process.fill(*span(page, page + 1), value)
            area.wrote(first, end, content)
    elif tolerate(lambda: user.process.fill(*span(first, end), byte)):
        area.wrote(first, end, byte)


@operation(weight=4, user=1, size=len(SIZES) - 1, then=5)
def mmap(world: World, user: int, size: int, then: int) -> None:
    """Map memory, at address 0 too, and perhaps write it or fault it in, in huge pages if there are any.

    Memory that need not be zero is only mapped: what is in it shows when it is read or written.
    """
    owner, pages = world.users[user % 2], SIZES[size % len(SIZES)]
    if sum(area.end - area.start for _, area in areas(world)) + pages > world.pages * 3 // 4:
        return
    fixed = then in {0, 3} and not any(area.start < pages for area in owner.areas)
    flags = (MAP_FIXED if fixed else 0) | (MAP_UNINITIALIZED if then == UNINITIALIZED else 0)
    start = owner.process.mmap(pages * PAGE_SIZE, flags) // PAGE_SIZE
    area = Area(start, start + pages, np.zeros(pages, dtype=np.uint8))
    owner.areas.append(area)
    if then == UNINITIALIZED:
        if not world.mm.config.want_init_on_alloc:
            area.unknown = np.ones(pages, dtype=np.bool_)
    elif then == 1:
        fill_pages(owner, area, start, start + pages, 0x11)
    elif then > 1:
        world.untouched = True
        if then == HUGE:
            owner.process.madvise(*span(start, start + pages), MADV_HUGEPAGE)
        tolerate(lambda: owner.process.madvise(*span(start, start + pages), MADV_POPULATE_WRITE))


@operation(user=1, left=len(LEFT) - 1, write=1)
def crowd(world: World, user: int, left: int, write: int) -> None:
    """Map nearly all memory that is free, in small pages: what comes next has to look for it."""
    owner = world.users[user % 2]
    pages = world.mm.vm_stats().free_pages - LEFT[left % len(LEFT)]
    if pages < 1 or len(areas(world)) >= MOST_AREAS:
        return
    start = owner.process.mmap(pages * PAGE_SIZE) // PAGE_SIZE
    area = Area(start, start + pages, np.zeros(pages, dtype=np.uint8))
    owner.areas.append(area)
    owner.process.madvise(*span(start, start + pages), MADV_NOHUGEPAGE)
    if write % 2:
        fill_pages(owner, area, start, start + pages, 0x11)
    else:
        world.untouched = True
        tolerate(lambda: owner.process.madvise(*span(start, start + pages), MADV_POPULATE_WRITE))


@operation(isolates=True)
def settle(world: World) -> None:
    """Everybody gives everything back: memory is whole again, and full of what they wrote."""
    world.give_everything_back()
    world.balloon(0)
    for user in world.users:
        world.enter(user)


@operation(when=anything_mapped, which=7, at=1023, length=5, byte=len(BYTES) - 1)
def fill(world: World, which: int, at: int, length: int, byte: int) -> None:
    """Write pages of a mapping."""
    if chosen := some_pages(world, which, at, length):
        fill_pages(*chosen, BYTES[byte % len(BYTES)])


@operation(weight=3, when=anything_mapped, which=7, at=1023, length=3)
def touch(world: World, which: int, at: int, length: int) -> None:
    """Write one byte to each of some pages, the one that is there or must be: the rest is not covered up."""
    if not (chosen := some_pages(world, which, at, length)):
        return
    user, area, first, end = chosen
    world.touches = True
    for page in range(first, min(end, first + 64)):
        byte = bytes([area.content[page - area.start]])
        tolerate(functools.partial(user.process.write, page * PAGE_SIZE + 3 * PAGE_SIZE // 4, byte))


@operation(weight=2, when=anything_mapped, which=7, at=1023, length=3)
def read(world: World, which: int, at: int, length: int) -> None:
    """Read pages of a mapping, which maps the zero page where nothing is, and fetches what is swapped out."""
    if not (chosen := some_pages(world, which, at, length)):
        return
    user, _, first, end = chosen
    end = min(end, first + 64)
    for page in range(first, end):
        tolerate(functools.partial(user.process.read, page * PAGE_SIZE + PAGE_SIZE // 2, 1))


@operation(weight=2, when=anything_mapped, which=7, at=1023, length=5)
def populate(world: World, which: int, at: int, length: int) -> None:
    """Fault pages in without touching them."""
    if chosen := some_pages(world, which, at, length):
        user, area, first, end = chosen
        # A page of a file that is mapped privately is copied.
        world.untouched, world.touches = area.under is None, True
        tolerate(lambda: user.process.madvise(*span(first, end), MADV_POPULATE_WRITE))


@operation(weight=2, when=anything_mapped, which=7, at=1023, length=5)
def munmap(world: World, which: int, at: int, length: int) -> None:
    """Unmap pages."""
    if chosen := some_pages(world, which, at, length):
        world.unmap(*chosen)


@operation(when=anything_mapped, which=7, at=1023, length=5)
def dontneed(world: World, which: int, at: int, length: int) -> None:
    """Drop pages; the mapping reads as zero afterwards."""
    if not (chosen := some_pages(world, which, at, length)):
        return
    user, area, first, end = chosen
    world.with_room(lambda: user.process.madvise(*span(first, end), MADV_DONTNEED), user)
    if not area.shared:
        user.lost -= set(range(first, end))
        area.dropped(first, end)


@operation(when=anything_mapped, which=7, gap=2)
def thin_out(world: World, which: int, gap: int) -> None:
    """Drop every so many-th page: what is left holds the memory around it apart."""
    chosen = [(user, area) for user, area in areas(world) if area.unit == 1]
    if not chosen:
        return
    user, area = chosen[which % len(chosen)]
    for page in range(area.start, min(area.end, area.start + THINNED), GAPS[gap % len(GAPS)]):
        advice = functools.partial(user.process.madvise, *span(page, page + 1), MADV_DONTNEED)
        world.with_room(advice, user)
        user.lost.discard(page)
        area.dropped(page, page + 1)


@operation(when=anything_mapped, which=7, at=1023, length=5, advice=len(ADVICE) - 1)
def advise(world: World, which: int, at: int, length: int, advice: int) -> None:
    """Swap pages out, or permit or forbid huge pages."""
    if chosen := some_pages(world, which, at, length, huge=False):
        user, _, first, end = chosen
        user.process.madvise(*span(first, end), ADVICE[advice % len(ADVICE)])


@operation(when=anything_mapped, which=7, at=1023, length=5, mode=3, mask=2)
def mbind(world: World, which: int, at: int, length: int, mode: int, mask: int) -> None:
    """Choose the nodes of pages to come."""
    if chosen := some_pages(world, which, at, length):
        user, _, first, end = chosen
        policy = POLICIES[mode % 4]
        nodes = 0 if policy == MPOL_DEFAULT else mask % 3 + 1 if world.nr_nodes == 2 else 1
        user.process.mbind(*span(first, end), policy, nodes)


@operation(user=1, mode=3, mask=2)
def set_policy(world: World, user: int, mode: int, mask: int) -> None:
    """Choose the nodes of a process's mappings to come."""
    policy = POLICIES[mode % 4]
    nodes = 0 if policy == MPOL_DEFAULT else mask % 3 + 1 if world.nr_nodes == 2 else 1
    world.users[user % 2].process.set_mempolicy(policy, nodes)


@operation(pages=len(LIMITS) - 1)
def limit(world: World, pages: int) -> None:
    """Give the second process's cgroup a limit."""
    more = LIMITS[pages % len(LIMITS)]
    used = world.mm.memcg.usage_bytes(world.cgroup)
    world.mm.memcg.set_max(world.cgroup, None if more is None else used + more * PAGE_SIZE)


@operation(user=1)
def exit_and_spawn(world: World, user: int) -> None:
    """End a process and start another in its place."""
    world.leave(world.users[user % 2])
    world.enter(world.users[user % 2])
