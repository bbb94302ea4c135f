# SPDX-License-Identifier: GPL-2.0-only
"""Steps of owners: blocks are allocated, written, and freed in every way there is."""

from __future__ import annotations

from hostzero.check.small.layout import (
    BROKEN_GIVEN,
    DONE,
    GIVEN_TWICE,
    LOSSY,
    MARK_ZEROED,
    NOBODYS,
    NOT_NOW,
    NOT_ZERO,
    NOW,
    NR_OWNED,
    OWNER_FLAGS,
    R_ALLOC,
    R_ALLOC_ZERO,
    R_FREE_DEFERRED,
    R_FREE_OTHER,
    R_FREE_ZEROED,
    SETUP,
    STEPS,
    TWICE,
    WORD,
    ZEROED_AGAIN,
    Scene,
    block_of,
    fail,
    first_set,
    has_broken,
    order_of,
    release,
)
from hostzero.check.small.settle import begin, give_back, hold, settle, write
from hostzero.check.small.step_codes import (
    AS_ZERO,
    B_ZEROED,
    CLEAN,
    FLAGGED,
    H_OWNER,
    KIND_COMP,
    KIND_MOVABLE,
    KIND_USER,
    KIND_ZERO,
    NOLOCK,
    NOLOCK_AS_ZERO,
    PUT_AS_ZERO,
    S_OWNERS,
    S_RECLAIM,
    SHARED,
)
from hostzero.jit import compiled
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.clear_page import clear_pages
from hostzero.mm.gfp import (
    __GFP_COMP,
    __GFP_DIRECT_RECLAIM,
    __GFP_NOMEMALLOC,
    __GFP_NORETRY,
    __GFP_NOWARN,
    __GFP_ZERO,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    USER_ADDR_NONE,
)
from hostzero.mm.mmzone import NO_PAGE, WORDS_PER_PAGE, Memory
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageHead,
    PG_dirty,
    PG_head,
    PG_hwpoison,
    PG_private,
    PG_referenced,
    PG_uptodate,
    compound_head,
)
from hostzero.mm.page_free import (
    __free_frozen_pages,
    __free_pages,
    free_frozen_pages_zeroed,
    free_pages_nolock,
    put_page,
    put_page_zeroed,
)
from hostzero.mm.prep import is_check_pages_enabled


@compiled
def check_given(mem: Memory, scene: Scene, pfn: int, order: int, gfp: int) -> int:
    """Check what an owner may expect of the block that it was given; the lists have been walked."""
    vm = mem.vm[0]
    if pfn < 0 or (pfn & ((1 << order) - 1)) != 0 or pfn + (1 << order) > vm.nr_pages:
        return fail(scene, NOBODYS, pfn, order, -1)
    compound = order > 0 and (gfp & __GFP_COMP) != 0
    known = True
    at = pfn
    while at < pfn + (1 << order):
        head = block_of(mem, scene, 1 - scene.ctl[NOW], at)
        if head < 0:
            return fail(scene, NOBODYS, at, order, -1)
        info = scene.shape[(1 - scene.ctl[NOW]) * vm.nr_pages + head]
        if (info & MARK_ZEROED) == 0:
            known = False
        at = head + (1 << order_of(info))
    end = pfn + (1 << order)
    held = first_set(scene.held, pfn, end)
    if held >= 0:
        return fail(scene, GIVEN_TWICE, held, order, -1)
    base = scene.ctl[NOW] * vm.nr_pages
    inside = first_set(scene.shape, base + pfn, base + end)
    if inside >= 0 or block_of(mem, scene, scene.ctl[NOW], pfn) >= 0:
        return fail(scene, TWICE, pfn, order, -1)
    for page in range(pfn, end):
        record = mem.mem_map[page]
        if (record.flags_f & PG_hwpoison) != 0:
            return fail(scene, BROKEN_GIVEN, page, order, -1)
        allowed = 0
        if page == pfn and compound:
            allowed = PG_head
        if (record.flags_f & PAGE_FLAGS_CHECK_AT_PREP & ~allowed) != 0 or record.private != 0:
            return fail(scene, OWNER_FLAGS, page, order, -1)
        references = 1 if page == pfn else 0
        if record._refcount != references or record.page_type != 0 or record._mapcount != -1:
            return fail(scene, OWNER_FLAGS, page, order, -1)
        head = compound_head(mem, page)
        if (compound and head != pfn) or (not compound and head != page):
            return fail(scene, OWNER_FLAGS, page, order, -1)
    wanted = (gfp & __GFP_ZERO) != 0 or vm.init_on_alloc != 0
    if wanted:
        word = first_set(mem.ram, pfn * WORDS_PER_PAGE, (pfn + (1 << order)) * WORDS_PER_PAGE)
        if word >= 0:
            fail(scene, NOT_ZERO, pfn, order, -1)
            scene.problem[WORD] = word
            return NOT_ZERO
    if known:
        scene.rows[R_ALLOC] += 1
        if wanted and vm.init_on_free == 0:
            scene.rows[R_ALLOC_ZERO] += 1
    if scene.ctl[LOSSY] == 0 and (known or not wanted or vm.init_on_free != 0):
        if vm.zeroed_bytes != scene.before[B_ZEROED]:
            return fail(scene, ZEROED_AGAIN, pfn, order, -1)
    return DONE


@compiled
def alloc_step(mem: Memory, scene: Scene, order: int, kind: int, cpu: int) -> int:
    """Allocate a block for a new owner."""
    n = scene.ctl[NR_OWNED]
    if n >= scene.ctl[SETUP + S_OWNERS]:
        return NOT_NOW
    gfp = GFP_KERNEL
    if (kind & KIND_MOVABLE) != 0:
        gfp = GFP_HIGHUSER_MOVABLE
    gfp |= __GFP_NORETRY | __GFP_NOWARN
    if scene.ctl[SETUP + S_RECLAIM] == 0:
        gfp = (gfp & ~__GFP_DIRECT_RECLAIM) | __GFP_NOMEMALLOC
    if (kind & KIND_ZERO) != 0:
        gfp |= __GFP_ZERO
    if (kind & KIND_COMP) != 0:
        gfp |= __GFP_COMP
    user_addr = USER_ADDR_NONE
    if (kind & KIND_USER) != 0 and (order == 0 or (kind & KIND_COMP) != 0):
        user_addr = 0x7000_0000 + (scene.ctl[STEPS] & 1023) * 4096 + 8
    begin(mem, scene)
    pfn = alloc_pages(mem, gfp, order, user_addr, 0, cpu)
    code = settle(mem, scene)
    if code != DONE or pfn == NO_PAGE:
        return code
    code = check_given(mem, scene, pfn, order, gfp)
    hold(scene, pfn, order, H_OWNER)
    scene.own_pfn[n] = pfn
    scene.own_order[n] = order
    scene.ctl[NR_OWNED] = n + 1
    return code


@compiled
def free_step(mem: Memory, scene: Scene, slot: int, how: int, cpu: int) -> int:
    """Free an owner's block in one of the ways that there are."""
    n = scene.ctl[NR_OWNED]
    if slot >= n:
        return NOT_NOW
    pfn = scene.own_pfn[slot]
    order = scene.own_order[slot]
    folio = order == 0 or PageHead(mem, pfn)
    if (how == PUT_AS_ZERO or how == SHARED) and not folio:
        return NOT_NOW
    begin(mem, scene)
    scene.ctl[NR_OWNED] = n - 1
    scene.own_pfn[slot] = scene.own_pfn[n - 1]
    scene.own_order[slot] = scene.own_order[n - 1]
    cleared = how == AS_ZERO or how == PUT_AS_ZERO or how == NOLOCK_AS_ZERO
    zeroed = cleared and mem.vm[0].page_poisoning == 0
    if zeroed:
        scene.rows[R_FREE_ZEROED] += 1
    else:
        scene.rows[R_FREE_OTHER] += 1
    if how == NOLOCK or how == NOLOCK_AS_ZERO:
        # A block that waits for the lock waits as it is.
        known = zeroed and not has_broken(mem, pfn, order)
        release(scene, pfn, order, known, MARK_ZEROED if known else 0)
    else:
        give_back(mem, scene, pfn, order, zeroed, MARK_ZEROED if zeroed else 0)
    if cleared:
        clear_pages(mem, pfn, 1 << order)
    elif how != CLEAN:
        write(mem, pfn, order)
    if how == FLAGGED:
        flags = PG_uptodate | PG_dirty | PG_referenced
        if not is_check_pages_enabled(mem):
            # With checks on, an owner's PG_private at free is a bad page, and stays out.
            flags |= PG_private
        for page in range(pfn, pfn + (1 << order)):
            mem.mem_map[page].flags_f |= flags
    if how == AS_ZERO:
        mem.mem_map[pfn]._refcount = 0
        free_frozen_pages_zeroed(mem, pfn, order, cpu)
    elif how == PUT_AS_ZERO:
        put_page_zeroed(mem, pfn, cpu)
    elif how == SHARED:
        mem.mem_map[pfn]._refcount = 2
        put_page_zeroed(mem, pfn, cpu)
        write(mem, pfn, order)
        put_page(mem, pfn, cpu)
    elif how == NOLOCK or how == NOLOCK_AS_ZERO:
        mem.zone[0].locked = 1
        mem.pcp[cpu].locked = 1
        if how == NOLOCK:
            free_pages_nolock(mem, pfn, order, cpu)
        else:
            mem.mem_map[pfn]._refcount = 0
            __free_frozen_pages(mem, pfn, order, FPI_TRYLOCK | FPI_ZEROED, cpu)
        mem.zone[0].locked = 0
        mem.pcp[cpu].locked = 0
        scene.rows[R_FREE_DEFERRED] += 1
    else:
        __free_pages(mem, pfn, order, cpu)
    return settle(mem, scene)
