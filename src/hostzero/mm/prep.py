# SPDX-License-Identifier: GPL-2.0-only
"""What is done to a page on its way in and on its way out.

Kernel: `mm/page_alloc.c`, `__free_pages_prepare`, `prep_new_page`, `post_alloc_hook`.

`post_alloc_hook` is the single point where known-zero state is consumed: no other
place decides whether a page needs zeroing. The written table of who sets, keeps and
clears the state is in docs/safety.md.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import compiled, far, inline
from hostzero.mm.buddy import FPI_NONE, FPI_PREPARED, FPI_TRYLOCK, FPI_ZEROED, __free_one_page
from hostzero.mm.cachealias import flush_dcache_folio
from hostzero.mm.clear_page import (
    clear_kernel_pages,
    folio_zero_user,
    kernel_poison_pages,
    kernel_unpoison_pages,
)
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.gfp import __GFP_COMP, __GFP_SKIP_ZERO, __GFP_ZERO, USER_ADDR_NONE
from hostzero.mm.list import list_add
from hostzero.mm.mmzone import (
    NR_PAGE_ORDERS,
    Memory,
    get_pageblock_migratetype,
    page_zone,
    trylock_free_pages,
)
from hostzero.mm.page_flags import (
    MAGIC_HWPOISON,
    PAGE_FLAGS_CHECK_AT_FREE,
    PAGE_FLAGS_CHECK_AT_PREP,
    PageHead,
    PageHWPoison,
    PG_head,
    PG_hwpoison,
    PGTY_none,
    __ClearPageZeroed,
    compound_order,
)
from hostzero.units import PAGE_SHIFT


@inline
def is_check_pages_enabled(mem: Memory) -> bool:
    """Return whether pages are checked at allocation and free (kernel: same name)."""
    vm = mem.vm[0]
    return (vm.debug_vm | vm.page_poisoning | vm.init_on_alloc | vm.init_on_free) != 0


@inline
def prep_compound_page(mem: Memory, pfn: int, order: int) -> None:
    """Make a block a compound page: order in the head, a way to it in each tail."""
    m = mem.mem_map
    m[pfn].flags_f |= PG_head
    m[pfn].order = order
    link = (pfn << 1) | 1
    for tail in range(pfn + 1, pfn + (1 << order)):
        mem.compound_head[tail] = link


@inline
def page_is_bad(mem: Memory, pfn: int, flags: int) -> bool:
    """Return whether an owner's traces are left on a page (kernel: `page_expected_state`)."""
    page = mem.mem_map[pfn]
    return (
        page._mapcount != -1
        or page._refcount != 0
        or page.mapping != 0
        or page.memcg_data != 0
        or page.page_type != PGTY_none
        or (page.flags_f & flags) != 0
    )


@compiled
def bad_page(mem: Memory, pfn: int) -> None:
    """Report a page that cannot be used (kernel: `bad_page`); it stays out of circulation."""
    mem.vm[0].nr_bad_pages += 1
    mem.vm[0].bug_pfn = pfn
    mem.mem_map[pfn]._mapcount = -1


@inline
def check_new_pages(mem: Memory, pfn: int, order: int) -> bool:
    """Return whether a block about to be handed out is bad (kernel: `check_new_pages`).

    Unlike Linux, which checks only if it was told to, this looks too once a page is broken: one
    that was in nobody's hands for a moment (isolated for a report) may be in any block.
    """
    if not is_check_pages_enabled(mem) and mem.vm[0].num_poisoned_pages == 0:
        return False
    return new_pages_are_bad(mem, pfn, order)


@far
def new_pages_are_bad(mem: Memory, pfn: int, order: int) -> bool:
    """Return whether a page of the block is bad, having reported it."""
    for page in range(pfn, pfn + (1 << order)):
        if page_is_bad(mem, page, PAGE_FLAGS_CHECK_AT_PREP) or PageHWPoison(mem, page):
            bad_page(mem, page)
            return True
    return False


@far
def free_tail_pages_prepare(mem: Memory, pfn: int, order: int, check: bool) -> int:
    """Undo a block's tails; return how many of them are bad (kernel: `free_tail_page_prepare`)."""
    m = mem.mem_map
    if VM_BUG_ON_PAGE(mem, PageHead(mem, pfn) and compound_order(mem, pfn) != order, pfn):
        raise VmBug("__free_pages_prepare: a compound page is freed with another order")
    bad = 0
    link = (pfn << 1) | 1
    compound = PageHead(mem, pfn)
    for tail in range(pfn + 1, pfn + (1 << order)):
        if compound:
            if check and mem.compound_head[tail] != link:
                bad_page(mem, tail)
                bad += 1
                continue
            mem.compound_head[tail] = 0
        if check and page_is_bad(mem, tail, PAGE_FLAGS_CHECK_AT_FREE):
            bad_page(mem, tail)
            bad += 1
            continue
        # Also drops a stale PG_private, which on a free page would mean "known zero".
        m[tail].flags_f &= ~PAGE_FLAGS_CHECK_AT_PREP
    m[pfn].flags_f &= ~PG_head
    m[pfn].order = 0
    return bad


@far
def overwrite_freed_pages(mem: Memory, pfn: int, order: int, fpi_flags: int) -> None:
    """Poison or zero a freed block, as configured.

    Source: `__free_pages_prepare`. A page freed with `FPI_ZEROED` is not zeroed again by
    `init_on_free` (patch 34), unless poisoning has just written to it.
    """
    vm = mem.vm[0]
    poisoning = vm.page_poisoning != 0
    if (fpi_flags & FPI_ZEROED) != 0:
        # The claim is about what the next owner sees at any address.
        flush_dcache_folio(mem, pfn, order)
    if poisoning:
        kernel_poison_pages(mem, pfn, 1 << order)
    if vm.init_on_free != 0 and not ((fpi_flags & FPI_ZEROED) != 0 and not poisoning):
        clear_kernel_pages(mem, pfn, 1 << order)
        vm.zeroed_bytes += 1 << (order + PAGE_SHIFT)


@compiled
def add_page_to_zone_llist(mem: Memory, zone: int, pfn: int, order: int) -> None:
    """Defer a free until somebody takes the zone lock (kernel: same name).

    The block went through prepare: what it says of itself, `PG_zeroed` included, stays true
    while it waits, because nobody owns it.
    """
    mem.mem_map[pfn].private = order
    list_add(mem, pfn, trylock_free_pages(mem, zone))
    mem.zone[zone].nr_trylock_free += 1 << order


@far
def free_healthy_pages(mem: Memory, pfn: int, order: int, fpi_flags: int) -> bool:
    """Free a block page by page if some of it is broken; return whether that was done.

    The kernel's prepare looks for a broken page at order 0 alone; in a larger block it would
    reach a free list. Nothing of such a block is known zero afterwards. A free that may not wait
    defers the block as it is. With `FPI_PREPARED` the block has been free before, and a page
    of it broke while it was on no list.
    """
    healthy = 0
    for page in range(pfn, pfn + (1 << order)):
        if not PageHWPoison(mem, page):
            healthy += 1
    if healthy == 1 << order:
        return False
    zone = page_zone(mem, pfn)
    if (fpi_flags & FPI_PREPARED) == 0:
        mem.vm[0].pgfree += healthy
        for page in range(pfn, pfn + (1 << order)):
            if not PageHWPoison(mem, page):
                overwrite_freed_pages(mem, page, 0, FPI_NONE)
    if (fpi_flags & FPI_TRYLOCK) != 0 and mem.zone[zone].locked != 0:
        add_page_to_zone_llist(mem, zone, pfn, order)
        return True
    __ClearPageZeroed(mem, pfn)
    for page in range(pfn, pfn + (1 << order)):
        if PageHWPoison(mem, page):
            mem.mem_map[page].private = MAGIC_HWPOISON
        else:
            __free_one_page(mem, page, zone, 0, get_pageblock_migratetype(mem, page), FPI_NONE)
    return True


@inline
def __free_pages_prepare(mem: Memory, pfn: int, order: int, fpi_flags: int) -> bool:
    """Make a page ready for the free lists; False if it must not get there.

    Source: `__free_pages_prepare`. Every flag of `PAGE_FLAGS_CHECK_AT_PREP` goes, the
    alias of `PG_zeroed` with them. With `FPI_PREPARED` all of this has been done, page by page.
    """
    if (fpi_flags & FPI_PREPARED) != 0:
        return True
    page = mem.mem_map[pfn]
    vm = mem.vm[0]
    if order == 0 and (page.flags_f & PG_hwpoison) != 0:
        # The page must never be used again: it stays where it is, outside every list.
        page.flags_f &= ~PAGE_FLAGS_CHECK_AT_PREP
        page.private = MAGIC_HWPOISON
        return False
    check = is_check_pages_enabled(mem)
    if order > 0 and free_tail_pages_prepare(mem, pfn, order, check) != 0:
        return False
    page.mapping = 0
    if check and page_is_bad(mem, pfn, PAGE_FLAGS_CHECK_AT_FREE):
        bad_page(mem, pfn)
        return False
    page.flags_f &= ~PAGE_FLAGS_CHECK_AT_PREP
    page.private = 0
    if order > 0 and vm.num_poisoned_pages != 0 and free_healthy_pages(mem, pfn, order, fpi_flags):
        return False
    if (vm.page_poisoning | vm.init_on_free | vm.cpu_dcache_aliasing) != 0:
        overwrite_freed_pages(mem, pfn, order, fpi_flags)
    vm.pgfree += 1 << order
    return True


@inline
def fpi_zeroed_holds(mem: Memory, fpi_flags: int) -> bool:
    """Return whether a page freed with these flags is still zero after prepare (patch 33).

    Poisoning has overwritten it, unless `init_on_free` zeroed it after that.
    """
    if (fpi_flags & FPI_ZEROED) == 0:
        return False
    return mem.vm[0].page_poisoning == 0 or mem.vm[0].init_on_free != 0


@compiled
def zero_new_pages(mem: Memory, pfn: int, order: int, gfp: int, user_addr: int) -> None:
    """Zero a block for its new owner; only `post_alloc_hook` decides to (patch 12)."""
    mem.vm[0].zeroed_bytes += 1 << (order + PAGE_SHIFT)
    if (gfp & __GFP_ZERO) != 0 and user_addr != USER_ADDR_NONE:
        # folio_zero_user takes the folio's size from its head (v8: VM_WARN_ON_ONCE).
        if VM_BUG_ON_PAGE(mem, order > 0 and not PageHead(mem, pfn), pfn):
            raise VmBug("post_alloc_hook: order > 0 without __GFP_COMP")
        folio_zero_user(mem, pfn, order, user_addr)
        return
    clear_kernel_pages(mem, pfn, 1 << order)
    if (gfp & __GFP_ZERO) == 0:
        flush_dcache_folio(mem, pfn, order)


@far
def init_with_aliasing_caches(
    mem: Memory, pfn: int, order: int, gfp: int, user_addr: int, init: bool
) -> bool:
    """Return whether a page must be zeroed on a machine whose caches alias (patches 12 and 23).

    A user page that was asked for as zero is zeroed through the user's mapping even if its
    memory is zero already, as with `init_on_free`: those zeros may still be in the kernel's
    lines. The machine decides, not `user_alloc_needs_zeroing()`, which is also true whenever
    `init_on_alloc` is off. The series leaves out pages that the host zeroed; here their hint
    cancels this zeroing like any other, and is counted as having done so. A caller that
    zeroes tags itself (`__GFP_SKIP_ZERO`) is left alone.
    """
    if (gfp & __GFP_ZERO) == 0:
        # Its owner writes it through the kernel's address (`cachealias`).
        flush_dcache_folio(mem, pfn, order)
        return init
    return init or (user_addr != USER_ADDR_NONE and (gfp & __GFP_SKIP_ZERO) == 0)


@inline
def post_alloc_hook(mem: Memory, pfn: int, order: int, gfp: int, user_addr: int, zeroed: bool) -> None:
    """Decide whether a page needs zeroing, and zero it: the one place that does.

    Args:
        mem: the memory manager's arrays.
        pfn: the head of the block, which is off every list.
        order: its order; compound metadata is set already (patch 11).
        gfp: the caller's flags.
        user_addr: the raw fault address, or `USER_ADDR_NONE` (patch 12).
        zeroed: the block was known to be zero when it left the free list (patch 22).

    With `init_on_free` every free page is zero already, except for users on a machine whose
    caches alias. A zero hint cancels the zeroing, there too: no cache line is left of a page
    that the host replaced. When no zeroing was wanted the hint is merely dropped.
    """
    vm = mem.vm[0]
    mem.mem_map[pfn].private = 0
    vm.pgalloc += 1 << order
    init = (
        vm.init_on_free == 0
        and (vm.init_on_alloc != 0 or (gfp & __GFP_ZERO) != 0)
        and (gfp & __GFP_SKIP_ZERO) == 0
    )
    if vm.page_poisoning != 0:
        kernel_unpoison_pages(mem, pfn, 1 << order)
    if zeroed and vm.zero_in_caller != 0:
        # Linux 7.2 without the series has no hints to consume (see `anon_folio`).
        vm.dropped_hint_bytes += 1 << (order + PAGE_SHIFT)
        zeroed = False
    if (vm.cpu_dcache_aliasing | vm.cpu_icache_aliasing) != 0:
        init = init_with_aliasing_caches(mem, pfn, order, gfp, user_addr, init)
    if init and order < NR_PAGE_ORDERS:
        vm.zero_allocs[order] += 1
        if zeroed:
            vm.known_zero_allocs[order] += 1
    if zeroed:
        if init:
            vm.known_zero_bytes += 1 << (order + PAGE_SHIFT)
        else:
            vm.dropped_hint_bytes += 1 << (order + PAGE_SHIFT)
        return
    if not init:
        return
    zero_new_pages(mem, pfn, order, gfp, user_addr)


@inline
def prep_new_page(mem: Memory, pfn: int, order: int, gfp: int, user_addr: int, zeroed: bool) -> None:
    """Make a block from the free lists a page of its new owner (kernel: `prep_new_page`).

    The compound metadata comes first: zeroing by folio needs the order (patch 11).
    """
    if order > 0 and (gfp & __GFP_COMP) != 0:
        prep_compound_page(mem, pfn, order)
    post_alloc_hook(mem, pfn, order, gfp, user_addr, zeroed)
