# SPDX-License-Identifier: GPL-2.0-only
"""The elementary steps of a small guest, each checked by the oracle as it is done.

What in a running guest is one call is several steps here wherever somebody else may act in
between: a report is filled, handed over, answered entry by entry and drained; a balloon page is
taken, answered, acknowledged, leaves and is freed; a page breaks and is dealt with. The order in
which steps are done is up to a search, and any order is one that a guest may see.

The allocator is the product's. What stands in for others: owners, who write words 0, 255 and 511
of their pages and nothing else (so that a look at three words tells whether a page is zero), and a
device that answers a report truthfully or fails. The rest of the device and the driver is searched
by `machine` and `wire`.
"""

from __future__ import annotations

from typing import Final

from hostzero.check.oracle import (
    BAD_PAGE,
    BATCH_STAGE,
    BATCH_START,
    BROKEN,
    BROKEN_GIVEN,
    DONE,
    FREE,
    GIVEN_TWICE,
    IN_FLIGHT,
    KIND_MASK,
    LEAVING,
    LOSSY,
    MARK_REPORTED,
    MARK_ZEROED,
    NOBODYS,
    NOT_NOW,
    NOT_ZERO,
    NOW,
    NR_OWNED,
    NR_RELEASED,
    OVER_ORDER,
    OVER_PFN,
    OWNER_FLAGS,
    POISON,
    R_ALLOC,
    R_ALLOC_ZERO,
    R_BROKEN_INSIDE,
    R_CHECK_FAILED,
    R_DEFLATE,
    R_DRAIN_NOT,
    R_DRAIN_SET,
    R_FREE_DEFERRED,
    R_FREE_OTHER,
    R_FREE_ZEROED,
    R_HIBERNATE,
    R_INFLATE,
    R_INFLATE_NOT,
    R_ISOLATE,
    R_PUT_BACK,
    R_TAKE_OFF,
    R_UNISOLATE,
    SETUP,
    STEPS,
    TOLD_AGAIN,
    TWICE,
    WORD,
    ZEROED_AGAIN,
    Scene,
    block_of,
    check_all,
    check_changed,
    fail,
    first_dirty_word,
    forget_released,
    has_broken,
    order_of,
    release,
    walk,
)
from hostzero.jit import compiled, far, inline
from hostzero.mm.balloon import (
    balloon_page_list_dequeue,
    balloon_page_list_enqueue,
    balloon_release,
    balloon_set_zeroed,
)
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
from hostzero.mm.memory_failure import is_free_buddy_page, put_page_back_buddy, take_page_off_buddy
from hostzero.mm.mmzone import (
    MIGRATE_PCPTYPES,
    NO_PAGE,
    NR_PAGE_ORDERS,
    PAGEBLOCK_NR_PAGES,
    WORDS_PER_PAGE,
    Memory,
    get_pageblock_isolate,
)
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageHead,
    PageHWPoison,
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
from hostzero.mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    start_isolate_page_range,
    undo_isolate_page_range,
)
from hostzero.mm.page_reporting import page_reporting_drain, page_reporting_fill
from hostzero.mm.pcplist import drain_all_pages
from hostzero.mm.prep import is_check_pages_enabled
from hostzero.mm.snapshot import forget_zero_claims
from hostzero.units import PAGE_SHIFT

ALLOC: Final = 0  # order, kind, cpu
FREE_BLOCK: Final = 1  # owner's number, how, cpu
DRAIN: Final = 2
REPORT_FILL: Final = 3  # order, migrate type
REPORT_SEND: Final = 4
REPORT_ANSWER: Final = 5  # entry, how
REPORT_DRAIN: Final = 6  # 1: the report succeeded
BALLOON_TAKE: Final = 7  # -, -, cpu
BALLOON_ANSWER: Final = 8  # entry, how
BALLOON_ACK: Final = 9
BALLOON_LEAVE: Final = 10
BALLOON_FREE: Final = 11  # -, -, cpu
BREAK: Final = 12  # page
BREAK_HANDLE: Final = 13
BREAK_MEND: Final = 14  # page
HIBERNATE: Final = 15
TRUST: Final = 16  # 1: the host's word is believed
ISOLATE: Final = 17  # pageblock
UNISOLATE: Final = 18  # pageblock
NR_OPS: Final = 19

NAMES: Final = (
    "alloc",
    "free",
    "drain",
    "report-fill",
    "report-send",
    "report-answer",
    "report-drain",
    "balloon-take",
    "balloon-answer",
    "balloon-ack",
    "balloon-leave",
    "balloon-free",
    "break",
    "break-handle",
    "break-mend",
    "hibernate",
    "trust",
    "isolate",
    "unisolate",
)

# Kinds of an allocation, bit by bit.
KIND_ZERO: Final = 1
KIND_MOVABLE: Final = 2
KIND_COMP: Final = 4
KIND_USER: Final = 8

# How an owner leaves its block.
CLEAN: Final = 0
DIRTY: Final = 1
FLAGGED: Final = 2  # dirty, and flags of the owner's are still set
AS_ZERO: Final = 3  # cleared by the owner, freed as known to be zero
PUT_AS_ZERO: Final = 4
SHARED: Final = 5  # put as known to be zero while somebody else has a reference and writes
NOLOCK: Final = 6  # from a place that holds the zone lock
NOLOCK_AS_ZERO: Final = 7  # as both: known to be zero, while the zone lock is held
NR_HOWS: Final = 8

# How the device answers.
FAILS: Final = 0
ZEROES: Final = 1
PARTLY: Final = 2  # of a report: half of the block; of a balloon page: all of it, without saying so

# What a scene knows of its setup: `ctl[SETUP + ...]`.
S_CAPACITY: Final = 0
S_OWNERS: Final = 1
S_BALLOON: Final = 2
S_PAGE_HINTS: Final = 3  # bit 7: balloon pages may be marked
S_RECLAIM: Final = 4

# held
H_OWNER: Final = 1
H_BATCH: Final = 2
H_BALLOON: Final = 3
H_BROKEN: Final = 4

# before
B_ZEROED: Final = 0
B_STALLS: Final = 1
B_BAD: Final = 2


@inline
def _hold(scene: Scene, pfn: int, order: int, who: int) -> None:
    for page in range(pfn, pfn + (1 << order)):
        scene.held[page] = who


@inline
def _write(mem: Memory, pfn: int, order: int) -> None:
    for page in range(pfn, pfn + (1 << order)):
        first = page * WORDS_PER_PAGE
        mem.ram[first] = 0x5A5A
        mem.ram[first + 255] = 0x5A5A
        mem.ram[first + 511] = 0x5A5A


@compiled
def _give_back(mem: Memory, scene: Scene, pfn: int, order: int, zeroed: bool, exact: int) -> None:
    # As `release`; broken pages stay out, and nothing is known of a block that has one.
    if not has_broken(mem, pfn, order):
        release(scene, pfn, order, zeroed, exact)
        return
    scene.rows[R_BROKEN_INSIDE] += 1
    for page in range(pfn, pfn + (1 << order)):
        if PageHWPoison(mem, page):
            scene.held[page] = H_BROKEN
        else:
            release(scene, page, 0, False, 0)


@compiled
def _settle(mem: Memory, scene: Scene) -> int:
    # The end of a step: look at everything that it did.
    vm = mem.vm[0]
    if vm.allocstall + vm.compact_stall != scene.before[B_STALLS]:
        scene.ctl[LOSSY] = 1
    code = walk(mem, scene)
    if code == DONE:
        code = check_changed(mem, scene)
    forget_released(scene)
    if code != DONE:
        return code
    if vm.nr_poison_errors != 0:
        return fail(scene, POISON, vm.bug_pfn, 0, -1)
    if vm.nr_bad_pages != scene.before[B_BAD]:
        if vm.num_poisoned_pages == 0:
            return fail(scene, BAD_PAGE, vm.bug_pfn, 0, -1)
        scene.rows[R_CHECK_FAILED] += 1
    return DONE


@compiled
def _begin(mem: Memory, scene: Scene) -> None:
    vm = mem.vm[0]
    scene.ctl[LOSSY] = 0
    scene.ctl[OVER_PFN] = -1
    scene.ctl[NR_RELEASED] = 0
    scene.ctl[STEPS] += 1
    scene.before[B_ZEROED] = vm.zeroed_bytes
    scene.before[B_STALLS] = vm.allocstall + vm.compact_stall
    scene.before[B_BAD] = vm.nr_bad_pages


@compiled
def _check_given(mem: Memory, scene: Scene, pfn: int, order: int, gfp: int) -> int:
    # What an owner may expect of the block that it was given. The lists have been walked.
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
    for page in range(pfn, pfn + (1 << order)):
        if scene.held[page] != 0:
            return fail(scene, GIVEN_TWICE, page, order, -1)
        if block_of(mem, scene, scene.ctl[NOW], page) >= 0:
            return fail(scene, TWICE, page, order, -1)
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
        word = first_dirty_word(mem, pfn * WORDS_PER_PAGE, (pfn + (1 << order)) * WORDS_PER_PAGE)
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
def _alloc(mem: Memory, scene: Scene, order: int, kind: int, cpu: int) -> int:
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
    _begin(mem, scene)
    pfn = alloc_pages(mem, gfp, order, user_addr, 0, cpu)
    code = _settle(mem, scene)
    if code != DONE or pfn == NO_PAGE:
        return code
    code = _check_given(mem, scene, pfn, order, gfp)
    _hold(scene, pfn, order, H_OWNER)
    scene.own_pfn[n] = pfn
    scene.own_order[n] = order
    scene.own_flags[n] = gfp
    scene.ctl[NR_OWNED] = n + 1
    return code


@compiled
def _free(mem: Memory, scene: Scene, slot: int, how: int, cpu: int) -> int:
    n = scene.ctl[NR_OWNED]
    if slot >= n:
        return NOT_NOW
    pfn = scene.own_pfn[slot]
    order = scene.own_order[slot]
    folio = order == 0 or PageHead(mem, pfn)
    if (how == PUT_AS_ZERO or how == SHARED) and not folio:
        return NOT_NOW
    _begin(mem, scene)
    scene.ctl[NR_OWNED] = n - 1
    scene.own_pfn[slot] = scene.own_pfn[n - 1]
    scene.own_order[slot] = scene.own_order[n - 1]
    scene.own_flags[slot] = scene.own_flags[n - 1]
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
        _give_back(mem, scene, pfn, order, zeroed, MARK_ZEROED if zeroed else 0)
    if cleared:
        clear_pages(mem, pfn, 1 << order)
    elif how != CLEAN:
        _write(mem, pfn, order)
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
        _write(mem, pfn, order)
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
    return _settle(mem, scene)


@compiled
def _report_fill(mem: Memory, scene: Scene, order: int, migratetype: int) -> int:
    start = scene.ctl[BATCH_START]
    if scene.ctl[BATCH_STAGE] > 1 or start == 0 or migratetype >= MIGRATE_PCPTYPES + 2:
        return NOT_NOW
    if order < mem.vm[0].page_reporting_order or mem.zone[0].nr_free[order] == 0:
        return NOT_NOW
    _begin(mem, scene)
    scene.cursor[0] = start
    scene.cursor[1] = 1 << 20
    page_reporting_fill(mem, 0, order, migratetype, scene.sg_pfn, scene.sg_order, scene.cursor)
    base = scene.ctl[NOW] * mem.vm[0].nr_pages
    for i in range(scene.cursor[0], start):
        pfn = scene.sg_pfn[i]
        info = scene.shape[base + pfn]
        if info & KIND_MASK != FREE or order_of(info) != scene.sg_order[i]:
            return fail(scene, NOBODYS, pfn, scene.sg_order[i], -1)
        if (info & MARK_REPORTED) != 0:
            return fail(scene, TOLD_AGAIN, pfn, scene.sg_order[i], -1)
        if (info & MARK_ZEROED) != 0:
            scene.rows[R_ISOLATE] += 1
        if (mem.mem_map[pfn].flags_f & PAGE_FLAGS_CHECK_AT_PREP) != 0:
            return fail(scene, OWNER_FLAGS, pfn, scene.sg_order[i], -1)
        scene.answered[i] = 0
        scene.zeroed[i] = 0
        _hold(scene, pfn, scene.sg_order[i], H_BATCH)
    scene.ctl[BATCH_START] = scene.cursor[0]
    if scene.cursor[0] < start:
        scene.ctl[BATCH_STAGE] = 1
    return _settle(mem, scene)


@compiled
def _report_send(scene: Scene) -> int:
    if scene.ctl[BATCH_STAGE] != 1:
        return NOT_NOW
    scene.ctl[BATCH_STAGE] = 2
    return DONE


@compiled
def _report_answer(mem: Memory, scene: Scene, entry: int, how: int) -> int:
    # Bits are numbered from the first entry of the call; the batch is filled from its end.
    i = scene.ctl[BATCH_START] + entry
    if scene.ctl[BATCH_STAGE] != 2 or i >= scene.ctl[SETUP + S_CAPACITY] or scene.answered[i] != 0:
        return NOT_NOW
    scene.answered[i] = 1
    count = 1 << scene.sg_order[i]
    # A device that is told of a pattern leaves it in place; what it says then must not matter.
    keeps = mem.vm[0].page_poisoning != 0
    if how == ZEROES:
        if not keeps:
            clear_pages(mem, scene.sg_pfn[i], count)
        scene.zeroed[entry] = 1
    else:
        scene.zeroed[entry] = 0
        if how == PARTLY and not keeps:
            clear_pages(mem, scene.sg_pfn[i] + count - (count + 1) // 2, (count + 1) // 2)
    return DONE


@compiled
def _report_drain(mem: Memory, scene: Scene, good: int) -> int:
    if scene.ctl[BATCH_STAGE] != 2:
        return NOT_NOW
    capacity = scene.ctl[SETUP + S_CAPACITY]
    start = scene.ctl[BATCH_START]
    for i in range(start, capacity):
        if scene.answered[i] == 0:
            if good != 0:
                return NOT_NOW
            scene.zeroed[i - start] = 0
    _begin(mem, scene)
    trusted = mem.vm[0].page_reporting_host_zeroes != 0
    for i in range(start, capacity):
        exact = 0
        if good != 0:
            exact = MARK_REPORTED
            if trusted and scene.zeroed[i - start] != 0:
                exact |= MARK_ZEROED
        if (exact & MARK_ZEROED) != 0:
            scene.rows[R_DRAIN_SET] += 1
        else:
            scene.rows[R_DRAIN_NOT] += 1
        _give_back(mem, scene, scene.sg_pfn[i], scene.sg_order[i], False, exact)
    page_reporting_drain(mem, scene.sg_pfn, scene.sg_order, start, capacity, good != 0, scene.zeroed)
    scene.ctl[BATCH_START] = capacity
    scene.ctl[BATCH_STAGE] = 0
    return _settle(mem, scene)


@compiled
def _balloon_take(mem: Memory, scene: Scene, cpu: int) -> int:
    n = scene.ctl[IN_FLIGHT]
    room = scene.ctl[SETUP + S_BALLOON]
    if mem.vm[0].nr_balloon_pages + scene.ctl[LEAVING] >= room or scene.ctl[LEAVING] != 0:
        return NOT_NOW
    gfp = GFP_HIGHUSER_MOVABLE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC
    if scene.ctl[SETUP + S_RECLAIM] == 0:
        gfp &= ~__GFP_DIRECT_RECLAIM
    _begin(mem, scene)
    pfn = alloc_pages(mem, gfp, 0, USER_ADDR_NONE, 0, cpu)
    code = _settle(mem, scene)
    if code != DONE or pfn == NO_PAGE:
        return code
    code = _check_given(mem, scene, pfn, 0, gfp)
    if code != DONE:
        return code
    _hold(scene, pfn, 0, H_BALLOON)
    scene.flight[n] = pfn
    scene.flight_zeroed[n] = -1
    scene.ctl[IN_FLIGHT] = n + 1
    _begin(mem, scene)
    scene.one[0] = pfn
    balloon_page_list_enqueue(mem, scene.one)
    return _settle(mem, scene)


@compiled
def _balloon_answer(mem: Memory, scene: Scene, entry: int, how: int) -> int:
    if entry >= scene.ctl[IN_FLIGHT] or scene.flight_zeroed[entry] >= 0:
        return NOT_NOW
    if how != FAILS:
        clear_pages(mem, scene.flight[entry], 1)
    scene.flight_zeroed[entry] = 1 if how == ZEROES else 0
    return DONE


@compiled
def _balloon_ack(mem: Memory, scene: Scene) -> int:
    n = scene.ctl[IN_FLIGHT]
    if n == 0:
        return NOT_NOW
    for i in range(n):
        if scene.flight_zeroed[i] < 0:
            return NOT_NOW
    _begin(mem, scene)
    for i in range(n):
        zeroed = scene.flight_zeroed[i] != 0 and scene.ctl[SETUP + S_PAGE_HINTS] != 0
        release(scene, scene.flight[i], 0, False, MARK_ZEROED if zeroed else 0)
        scene.held[scene.flight[i]] = H_BALLOON
        if zeroed:
            scene.rows[R_INFLATE] += 1
        else:
            scene.rows[R_INFLATE_NOT] += 1
        scene.one[0] = scene.flight[i]
        scene.one_zeroed[0] = 1 if zeroed else 0
        balloon_set_zeroed(mem, scene.one, scene.one_zeroed)
    scene.ctl[IN_FLIGHT] = 0
    return _settle(mem, scene)


@compiled
def _balloon_leave(mem: Memory, scene: Scene) -> int:
    n = scene.ctl[LEAVING]
    if scene.ctl[IN_FLIGHT] != 0 or mem.vm[0].nr_balloon_pages == 0:
        return NOT_NOW
    _begin(mem, scene)
    if balloon_page_list_dequeue(mem, scene.one) == 0:
        return fail(scene, NOBODYS, -1, 0, -1)
    pfn = scene.one[0]
    info = scene.shape[scene.ctl[NOW] * mem.vm[0].nr_pages + pfn]
    scene.leaving[n] = pfn
    scene.leaving_zeroed[n] = 1 if (info & MARK_ZEROED) != 0 else 0
    scene.ctl[LEAVING] = n + 1
    return _settle(mem, scene)


@compiled
def _balloon_free(mem: Memory, scene: Scene, cpu: int) -> int:
    n = scene.ctl[LEAVING]
    if n == 0:
        return NOT_NOW
    _begin(mem, scene)
    for i in range(n):
        zeroed = scene.leaving_zeroed[i] != 0 and mem.vm[0].page_poisoning == 0
        if zeroed:
            scene.rows[R_DEFLATE] += 1
        _give_back(mem, scene, scene.leaving[i], 0, zeroed, MARK_ZEROED if zeroed else 0)
    for i in range(n):
        scene.one[0] = scene.leaving[i]
        balloon_release(mem, scene.one, cpu)
    scene.ctl[LEAVING] = 0
    return _settle(mem, scene)


@compiled
def _break(mem: Memory, scene: Scene, pfn: int) -> int:
    # TestSetPageHWPoison, under the zone lock (patch 2): atomic, and nobody is in between.
    if scene.ctl[BROKEN] != 0 or pfn >= mem.vm[0].nr_pages or PageHWPoison(mem, pfn):
        return NOT_NOW
    mem.mem_map[pfn].flags_f |= PG_hwpoison
    mem.vm[0].num_poisoned_pages += 1
    scene.ctl[BROKEN] = pfn + 1
    return DONE


@compiled
def _break_handle(mem: Memory, scene: Scene) -> int:
    pfn = scene.ctl[BROKEN] - 1
    if pfn < 0:
        return NOT_NOW
    scene.ctl[BROKEN] = 0
    if mem.mem_map[compound_head(mem, pfn)]._refcount != 0:
        return DONE  # its owner keeps it; it stays out once it is freed
    _begin(mem, scene)
    head = block_of(mem, scene, scene.ctl[NOW], pfn)
    info = 0
    if head >= 0:
        info = scene.shape[scene.ctl[NOW] * mem.vm[0].nr_pages + head]
    if is_free_buddy_page(mem, pfn) and info & KIND_MASK == FREE:
        scene.ctl[OVER_PFN] = head
        scene.ctl[OVER_ORDER] = order_of(info)
        if (info & MARK_ZEROED) != 0:
            scene.rows[R_TAKE_OFF] += 1
    else:
        drain_all_pages(mem)
        scene.ctl[LOSSY] = 1
    if take_page_off_buddy(mem, pfn):
        mem.mem_map[pfn]._refcount = 1
        scene.held[pfn] = H_BROKEN
    return _settle(mem, scene)


@compiled
def _break_mend(mem: Memory, scene: Scene, pfn: int) -> int:
    if pfn >= mem.vm[0].nr_pages or scene.held[pfn] != H_BROKEN or scene.ctl[BROKEN] == pfn + 1:
        return NOT_NOW
    _begin(mem, scene)
    scene.rows[R_PUT_BACK] += 1
    _write(mem, pfn, 0)
    release(scene, pfn, 0, False, 0)
    if not put_page_back_buddy(mem, pfn):
        return fail(scene, NOBODYS, pfn, 0, -1)
    mem.vm[0].num_poisoned_pages -= 1
    return _settle(mem, scene)


@compiled
def _hibernate(mem: Memory, scene: Scene) -> int:
    # The device is gone before the image is written: no report is under way, the balloon is empty.
    if scene.ctl[BATCH_STAGE] != 0 or scene.ctl[LEAVING] != 0 or mem.vm[0].nr_balloon_pages != 0:
        return NOT_NOW
    vm = mem.vm[0]
    base = scene.ctl[NOW] * vm.nr_pages
    for pfn in range(vm.nr_pages):
        info = scene.shape[base + pfn]
        if info != 0:
            _write(mem, pfn, order_of(info))
            if (info & MARK_ZEROED) != 0:
                scene.rows[R_HIBERNATE] += 1
    _begin(mem, scene)
    forget_zero_claims(mem)
    scene.ctl[LOSSY] = 1
    code = _settle(mem, scene)
    if code != DONE:
        return code
    return check_all(mem, scene)


@compiled
def _trust(mem: Memory, scene: Scene, on: int) -> int:
    # Another device, with or without bit 6: no report is under way when it comes.
    if scene.ctl[BATCH_STAGE] != 0 or mem.vm[0].page_reporting_host_zeroes == on:
        return NOT_NOW
    if mem.vm[0].page_poisoning != 0:
        return NOT_NOW
    mem.vm[0].page_reporting_host_zeroes = on
    return DONE


@compiled
def _isolate(mem: Memory, scene: Scene, block: int, on: bool) -> int:
    start = block * PAGEBLOCK_NR_PAGES
    if start + PAGEBLOCK_NR_PAGES > mem.vm[0].nr_pages:
        return NOT_NOW
    _begin(mem, scene)
    if on:
        # All or nothing; what was undone may have merged, and lost its hint. Beside an isolated
        # neighbour a large block is split and merges again, which the host was not told of.
        neighbour = min(start ^ PAGEBLOCK_NR_PAGES, mem.vm[0].nr_pages - 1)
        if get_pageblock_isolate(mem, neighbour):
            scene.ctl[LOSSY] = 1
        if not start_isolate_page_range(mem, start, start + PAGEBLOCK_NR_PAGES, PB_ISOLATE_MODE_OTHER):
            scene.ctl[LOSSY] = 1
    else:
        # A free pageblock may be taken off and put back, so that it merges: its hint is lost.
        scene.ctl[LOSSY] = 1
        info = scene.shape[scene.ctl[NOW] * mem.vm[0].nr_pages + start]
        if get_pageblock_isolate(mem, start) and info & KIND_MASK == FREE and (info & MARK_ZEROED) != 0:
            scene.rows[R_UNISOLATE] += 1
        undo_isolate_page_range(mem, start, start + PAGEBLOCK_NR_PAGES)
    return _settle(mem, scene)


@far
def act(mem: Memory, scene: Scene, op: int, a: int, b: int, c: int) -> int:
    """Do one step and check what it did.

    Returns DONE; NOT_NOW if it cannot be done in this state, which then is as it was; or the
    code of what was found (`small_guest.violation` describes it).

    Raises:
        VmBug: an assertion of the allocator failed.
    """
    if op == ALLOC:
        return _alloc(mem, scene, a, b, c)
    if op == FREE_BLOCK:
        return _free(mem, scene, a, b, c)
    if op == DRAIN:
        _begin(mem, scene)
        drain_all_pages(mem)
        return _settle(mem, scene)
    if op == REPORT_FILL:
        return _report_fill(mem, scene, a, b)
    if op == REPORT_SEND:
        return _report_send(scene)
    if op == REPORT_ANSWER:
        return _report_answer(mem, scene, a, b)
    if op == REPORT_DRAIN:
        return _report_drain(mem, scene, a)
    if op == BALLOON_TAKE:
        return _balloon_take(mem, scene, c)
    if op == BALLOON_ANSWER:
        return _balloon_answer(mem, scene, a, b)
    if op == BALLOON_ACK:
        return _balloon_ack(mem, scene)
    if op == BALLOON_LEAVE:
        return _balloon_leave(mem, scene)
    if op == BALLOON_FREE:
        return _balloon_free(mem, scene, c)
    if op == BREAK:
        return _break(mem, scene, a)
    if op == BREAK_HANDLE:
        return _break_handle(mem, scene)
    if op == BREAK_MEND:
        return _break_mend(mem, scene, a)
    if op == HIBERNATE:
        return _hibernate(mem, scene)
    if op == TRUST:
        return _trust(mem, scene, a)
    if op == ISOLATE:
        return _isolate(mem, scene, a, True)
    if op == UNISOLATE:
        return _isolate(mem, scene, a, False)
    return NOT_NOW


NR_REL: Final = 1 << NR_PAGE_ORDERS
"""Blocks that one step can put back: each page of the largest one may come back on its own."""

PAGE_BYTES: Final = 1 << PAGE_SHIFT
