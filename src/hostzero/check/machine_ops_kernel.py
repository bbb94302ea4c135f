# SPDX-License-Identifier: GPL-2.0-only
"""Operations of the kernel itself: blocks, contiguous ranges, CMA, compaction, what is parked."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from hostzero.check.inventory import BALLOON, found
from hostzero.check.inventory import FREE as FREE_PLACE
from hostzero.check.machine_ops import operation
from hostzero.errors import OutOfMemory
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.cachealias import evict, evict_all
from hostzero.mm.cma import cma_alloc_frozen_compound
from hostzero.mm.contig import alloc_contig_frozen_pages_user
from hostzero.mm.gfp import (
    GFP_COMP,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_NORETRY,
    GFP_THISNODE,
    GFP_ZERO,
    USER_ADDR_NONE,
)
from hostzero.mm.mmzone import MAX_PAGE_ORDER, NO_PAGE
from hostzero.mm.page_flags import PageHead
from hostzero.mm.page_free import __free_frozen_pages
from hostzero.units import PAGE_SIZE, Pfn

if TYPE_CHECKING:
    from hostzero.check.world import World

WISHES = (0, GFP_ZERO, GFP_COMP, GFP_ZERO | GFP_COMP)
MOST_KEPT = 12
MOST_TAKEN = 64
BULKS = (5, 1, 40)
STAINS = (0x3C, 0xFF, 1)
PARKED_ORDERS = (0, 1, 2, 3, 9)
KEEP, FREE, NOLOCK, NOLOCK_PCP, ZEROED, PUT_ZEROED, SHARED, PRIVATE, NOLOCK_ZEROED, FLAGGED = range(10)


@operation(weight=3, order=10, movable=1, wish=3, node=1, fate=9)
def kernel_block(world: World, order: int, movable: int, wish: int, node: int, fate: int) -> None:
    """A block is taken, written, and freed in one of several ways; some stay."""
    mm, cpu, flags = world.mm, world.nr_cpus - 1, WISHES[wish % 4]
    gfp = (GFP_HIGHUSER_MOVABLE if movable % 2 else GFP_KERNEL) | GFP_NORETRY | flags
    order %= 11
    world.unasked = not flags & GFP_ZERO
    try:
        pfn = mm.alloc_pages(gfp, order, cpu=cpu, node=node % world.nr_nodes)
    except OutOfMemory:
        return
    world.taken(pfn, order, zeroed=bool(flags & GFP_ZERO), fill=0x77)
    record = world.mem.mem_map[pfn]
    zone = int(record.zone)
    if fate in {KEEP, PRIVATE} and len(world.blocks) < MOST_KEPT:
        world.blocks.append((pfn, order, 0x77))
        if fate == PRIVATE:
            world.use_flags(pfn, order)
    elif fate in {NOLOCK, NOLOCK_PCP}:
        with mm.zone_lock(zone, cpu=cpu if fate == NOLOCK_PCP else None):
            mm.free_pages_nolock(pfn, order, cpu=cpu)
    elif fate == NOLOCK_ZEROED:
        _make_zero(world, pfn, order)
        record._refcount = 0
        with mm.zone_lock(zone, cpu=cpu):
            __free_frozen_pages(mm.mem, pfn, order, FPI_TRYLOCK | FPI_ZEROED, cpu)
    elif fate == ZEROED:
        _free(world, pfn, order, zeroed=True, cpu=cpu)
    elif fate == PUT_ZEROED and (order == 0 or flags & GFP_COMP):
        _make_zero(world, pfn, order)
        mm.put_page_zeroed(pfn, cpu=cpu)
    elif fate == SHARED and (order == 0 or flags & GFP_COMP):
        # Somebody else holds a reference, and writes after the first owner has said "zero".
        world.bytes_of(pfn, order)[:] = 0
        record._refcount += 1
        if mm.put_page_zeroed(pfn, cpu=cpu):
            found("rot", "a folio was freed that somebody holds a reference to", pfn, order=order)
        world.bytes_of(pfn, order)[:] = 0x78
        mm.free_pages(pfn, order, cpu=cpu)
    elif fate == SHARED and len(world.blocks) < MOST_KEPT:
        # Not a folio: the reference holds the first page, and the others go.
        record._refcount += 1
        mm.free_pages(pfn, order, cpu=cpu)
        world.blocks.append((pfn, 0, 0x77))
    else:
        if fate == FLAGGED:
            world.use_flags(pfn, order)
            world.leave_flags(pfn, order)
        mm.free_pages(pfn, order, cpu=cpu)


@operation(order=3, count=len(BULKS) - 1, zero=1)
def bulk(world: World, order: int, count: int, zero: int) -> None:
    """Many blocks of one order are taken at once, written, and freed at once."""
    cpu, flags = world.nr_cpus - 1, GFP_ZERO if zero % 2 else 0
    world.unasked = not flags
    wanted = BULKS[count % len(BULKS)]
    pfns = world.mm.alloc_pages_bulk(GFP_KERNEL | GFP_NORETRY | flags, wanted, order=order % 4, cpu=cpu)
    for pfn in pfns.tolist():
        world.taken(pfn, order % 4, zeroed=bool(flags), fill=0x77)
    world.mm.free_pages_bulk(pfns, order % 4, cpu=cpu)


@operation(order=4, movable=1, wish=3, node=1)
def exhaust(world: World, order: int, movable: int, wish: int, node: int) -> None:
    """The kernel takes and keeps blocks of one order until there are none: the last is compacted for."""
    flags = WISHES[wish % 4]
    gfp = (GFP_HIGHUSER_MOVABLE if movable % 2 else GFP_KERNEL) | GFP_NORETRY | flags
    world.unasked = not flags & GFP_ZERO
    while len(world.blocks) < MOST_TAKEN:
        try:
            pfn = world.mm.alloc_pages(gfp, order, cpu=world.nr_cpus - 1, node=node % world.nr_nodes)
        except OutOfMemory:
            return
        world.taken(pfn, order, zeroed=bool(flags & GFP_ZERO), fill=0x77)
        world.blocks.append((pfn, order, 0x77))


@operation(when=lambda world: bool(world.blocks), which=MOST_KEPT - 1, zeroed=1)
def free_kernel_block(world: World, which: int, zeroed: int) -> None:
    """A block is freed, as zero by an owner who has made it so, or with the owner's flags still on it."""
    if not world.blocks:
        return
    pfn, order, _ = world.blocks.pop(which % len(world.blocks))
    world.leave_flags(pfn, order)
    _free(world, Pfn(pfn), order, zeroed=bool(zeroed % 2))


@operation(when=lambda world: bool(world.blocks), which=MOST_KEPT - 1, zeroed=(1 << 16) - 1)
def free_apart(world: World, which: int, zeroed: int) -> None:
    """A block is taken apart and its pages are freed one by one, some as zero (kernel: `split_page`)."""
    if not world.blocks:
        return
    pfn, order, _ = world.blocks.pop(which % len(world.blocks))
    world.leave_flags(pfn, order)
    if PageHead(world.mem, pfn):
        world.mm.free_pages(Pfn(pfn), order)
        return
    cpu = world.nr_cpus - 1
    world.mem.mem_map["_refcount"][pfn : pfn + (1 << order)] = 1
    for page in range(pfn, pfn + (1 << order)):
        _free(world, Pfn(page), 0, zeroed=bool(zeroed >> (page - pfn) % 16 & 1), cpu=cpu)


def _free(world: World, pfn: Pfn, order: int, *, zeroed: bool, cpu: int = 0) -> None:
    if not zeroed:
        world.mm.free_pages(pfn, order, cpu=cpu)
        return
    _make_zero(world, pfn, order)
    world.mem.mem_map[pfn]._refcount = 0
    world.mm.free_frozen_pages_zeroed(pfn, order, cpu=cpu)


def _make_zero(world: World, pfn: int, order: int) -> None:
    world.bytes_of(pfn, order)[:] = 0
    world.host.shown(pfn, 1 << order)


@operation(isolates=True, weight=2, order=11, wish=3, node=1, only=1, user=1)
def take_run(world: World, order: int, wish: int, node: int, only: int, user: int) -> None:
    """A contiguous range is taken, as a folio or page by page."""
    if len(world.runs) > 3 or (order > MAX_PAGE_ORDER and world.crowded):
        return
    order, node, flags = order % 12, node % world.nr_nodes, WISHES[wish % 4]
    gfp = GFP_KERNEL | flags | (GFP_THISNODE if only % 2 else 0)
    address = 0x1234_5000 if user % 2 and flags & GFP_COMP else USER_ADDR_NONE
    world.unasked = not flags & GFP_ZERO
    pfn = alloc_contig_frozen_pages_user(world.mm, order, gfp, node, address)
    if pfn == NO_PAGE:
        return
    keep_run(world, world.runs, pfn, order, flags)
    if user % 2:
        world.use_flags(pfn, order)
    if only % 2 and int(world.mem.zone[int(world.mem.mem_map[pfn].zone)].node) != node:
        found("rot", "a range is of another node than the only one that was asked for", pfn, order=order)


def keep_run(world: World, runs: list[tuple[int, int]], pfn: int, order: int, flags: int) -> None:
    """Look at a range and write it."""
    if world.mm.config.dcache_aliasing:
        evict(world.mem, pfn, 1 << order)  # the kernel sees its own lines first
    world.taken(pfn, order, zeroed=bool(flags & GFP_ZERO), fill=0x99)
    runs.append((pfn, order))


@operation(isolates=True, weight=4, when=lambda world: world.mm.cma.count > 0, order=11, zero=1)
def take_from_cma(world: World, order: int, zero: int) -> None:
    """A folio is taken out of the CMA area."""
    if world.mm.cma.count and len(world.cma) < 3:
        flags = GFP_ZERO if zero % 2 else 0
        world.unasked = not flags
        pfn = cma_alloc_frozen_compound(world.mm, order % 12, flags)
        if pfn != NO_PAGE:
            keep_run(world, world.cma, pfn, order % 12, flags)


@operation(when=lambda world: bool(world.runs or world.cma), count=1)
def give_runs_back(world: World, count: int) -> None:
    """Contiguous ranges are freed, the oldest first."""
    world.give_runs_back(count % 2 + 1)


@operation(isolates=True)
def compact(world: World) -> None:
    """All memory is compacted."""
    world.mm.compact_memory()


@operation(weight=2, byte=len(STAINS) - 1)
def stain(world: World, byte: int) -> None:
    """Free memory of which nobody says anything holds anything, as if each owner had written to the last."""
    config, before = world.mm.config, world.before
    if before is None:
        return
    place = before.pages.place
    # What is free is overwritten where that is promised; what is in the balloon and in pools is not.
    first = BALLOON if config.page_poisoning or config.want_init_on_free else FREE_PLACE
    anything = (place >= first) & ~before.pages.zeroed
    if config.dcache_aliasing:
        anything &= world.mem.kernel_lines[: world.pages] == 0
    world.mm.ram_bytes.reshape(-1, PAGE_SIZE)[anything] = STAINS[byte % len(STAINS)]


@operation(order=len(PARKED_ORDERS) - 1, movable=1, count=5, zeroed=63)
def park(world: World, order: int, movable: int, count: int, zeroed: int) -> None:
    """Blocks are taken and freed one after the other, some of them as zero: they wait on a CPU's list."""
    gfp = (GFP_HIGHUSER_MOVABLE if movable % 2 else GFP_KERNEL) | GFP_NORETRY
    order, cpu, taken = PARKED_ORDERS[order % len(PARKED_ORDERS)], world.nr_cpus - 1, list[Pfn]()
    world.unasked = True
    with suppress(OutOfMemory):
        for _ in range(count % 6 + 1):
            taken.append(world.mm.alloc_pages(gfp, order, cpu=cpu))
    for i, pfn in enumerate(taken):
        world.taken(pfn, order, zeroed=False, fill=0x77)
        _free(world, pfn, order, zeroed=bool(zeroed >> i & 1), cpu=cpu)


@operation()
def drain(world: World) -> None:
    """What is parked on per-CPU lists goes back."""
    world.mm.drain_all_pages()


@operation(when=lambda world: world.mm.config.dcache_aliasing)
def evict_lines(world: World) -> None:
    """The cache writes every line back, at the worst time."""
    if world.mm.config.dcache_aliasing:
        evict_all(world.mem)
