# SPDX-License-Identifier: GPL-2.0-only
"""The oracle of the small guests: what the lists say before and after a step, and the law between.

After each step every list is walked again. A block that is as it was is believed; one that is
new, changed or moved must follow from what was there before and from what the step itself put
back (`Scene.rel_*`):

* a part of a block says what the block said;
* a block that was put together is known to be zero if each of its parts was, and is not reported;
* a block that came back whole says what it came back with;
* nothing else is on a list.

That is patches 3, 22, 25, 26, 30 and 33 in one sentence each, but not their code: it holds for
every way in which the allocator may merge, split, move and park. It goes both ways: a claim too
much may become a wrong byte, a claim too few is a page zeroed again. Claims that are new are
compared with the bytes in guest memory; so is every page that was asked for as zero.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from hostzero.jit import COMPILER_ON, compiled, far, inline
from hostzero.mm.list import list_next
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_HIGHATOMIC,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    PAGEBLOCK_NR_PAGES,
    PAGEBLOCK_ORDER,
    WORDS_PER_PAGE,
    Memory,
    free_list,
    get_pageblock_migratetype,
    pcp_list,
    pcp_of,
)
from hostzero.mm.page_flags import (
    PAGE_FLAGS_CHECK_AT_PREP,
    PageHWPoison,
    PG_reported,
    PG_zeroed,
    PGTY_buddy,
    PGTY_none,
    PGTY_offline,
)
from hostzero.mm.pcplist import pindex_to_order

# What stands in a shape for the head of a block: 0 for no head, else these packed together.
FREE: Final = 1
PARKED: Final = 2
DEFERRED: Final = 3
BALLOON: Final = 4
KIND_MASK: Final = 7
ORDER_SHIFT: Final = 3
ORDER_MASK: Final = 15
MARK_ZEROED: Final = 1 << 7
MARK_REPORTED: Final = 1 << 8
MARKS: Final = MARK_ZEROED | MARK_REPORTED
PLACE_SHIFT: Final = 9  # the list's head

# ctl: single values of a scene.
NOW: Final = 0  # which half of `shape` is the present
NR_CHANGED: Final = 1
NR_RELEASED: Final = 2
LOSSY: Final = 3  # this step may lose marks: what it did has several parts
NR_OWNED: Final = 4
BATCH_START: Final = 5  # first entry of the batch; the capacity if there is none
BATCH_STAGE: Final = 6
IN_FLIGHT: Final = 7  # balloon pages that the device has not acknowledged
LEAVING: Final = 8  # pages that have left the balloon's list and are not free yet
BROKEN: Final = 9  # the page that is marked broken and not dealt with, plus one
STEPS: Final = 10
OVER_PFN: Final = 11  # the block whose parts must lose their marks
OVER_ORDER: Final = 12
STATE: Final = 13  # of the random source
NR_BAD: Final = 14  # bad pages that were expected
LEAKED: Final = 15  # pages that are nobody's after a failed check
SETUP: Final = 16  # what `steps` needs of the setup, from here on
NR_CTL: Final = 32

# problem: what was found.
CODE: Final = 0
PFN: Final = 1
ORDER: Final = 2
PLACE: Final = 3
WORD: Final = 4  # of guest memory; -1 for none
EXPECTED: Final = 5
FOUND: Final = 6
NR_PROBLEM: Final = 8

DONE: Final = 0
NOT_NOW: Final = 1
BAD_LINKS: Final = 100
BAD_BLOCK: Final = 101
TWICE: Final = 102
DIRTY_RECORD: Final = 103
BAD_COUNT: Final = 104
NOBODYS: Final = 105
OWNED: Final = 106
FALSE_ZERO: Final = 107
INVENTED: Final = 108
FORGOTTEN: Final = 109
FALSELY_TOLD: Final = 110
TOLD_AGAIN: Final = 111
NOT_ZERO: Final = 112
OWNER_FLAGS: Final = 113
GIVEN_TWICE: Final = 114
ZEROED_AGAIN: Final = 115
BAD_PAGE: Final = 116
POISON: Final = 117
BROKEN_GIVEN: Final = 118
MISSING: Final = 119
WRONG_TYPE: Final = 120
UNMERGED: Final = 121

NR_ROWS: Final = 40

# tally: blocks by order, and then pages
T_FREE: Final = NR_PAGE_ORDERS
T_CMA: Final = T_FREE + 1
T_HIGHATOMIC: Final = T_FREE + 2
T_DEFERRED: Final = T_FREE + 3
T_BALLOON: Final = T_FREE + 4
T_CPUS: Final = T_FREE + 5
MAX_CPUS: Final = 8
NR_TALLY: Final = T_CPUS + MAX_CPUS

if COMPILER_ON:

    @compiled
    def first_dirty_word(mem: Memory, start: int, end: int) -> int:
        """Return the first word of guest memory in `[start, end)` that is not zero, or -1."""
        ram = mem.ram
        word = start
        # Eight at a time, a cache line: the compiler makes few and wide instructions of it.
        while word + 8 <= end:
            any_bit = ram[word] | ram[word + 1] | ram[word + 2] | ram[word + 3]
            any_bit |= ram[word + 4] | ram[word + 5] | ram[word + 6] | ram[word + 7]
            if any_bit != 0:
                break
            word += 8
        while word < end:
            if ram[word] != 0:
                return word
            word += 1
        return -1

    @compiled
    def first_busy_head(mem: Memory, head: int, end: int) -> int:
        """Return the first list head in `[head, end)` whose list is not empty, or `end`."""
        while head < end and mem.mem_map[head].lru_next == head:
            head += 1
        return head

else:

    def first_dirty_word(mem: Memory, start: int, end: int) -> int:
        """Return the first word of guest memory in `[start, end)` that is not zero, or -1."""
        (dirty,) = mem.ram[start:end].nonzero()
        return int(start + dirty[0]) if len(dirty) else -1

    def first_busy_head(mem: Memory, head: int, end: int) -> int:
        """Return the first list head in `[head, end)` whose list is not empty, or `end`."""
        (busy,) = (mem.mem_map["lru_next"][head:end] != np.arange(head, end)).nonzero()
        return int(head + busy[0]) if len(busy) else end


class Scene(NamedTuple):
    """All that changes besides `Memory`, as arrays of 64-bit integers.

    `held`, `source` and `shape` go by page; `rel_*` describe the blocks that the current step
    puts back, `own_*` the owners' blocks.
    """

    ctl: Any
    problem: Any
    shape: Any  # [2 * nr_pages]: the present and the past
    changed: Any
    held: Any  # by page: who has it (0: a list, or nobody)
    source: Any  # by page: the released block that it belongs to, plus one
    rel_pfn: Any
    rel_order: Any
    rel_zeroed: Any  # what the block is known to be if it merges
    rel_exact: Any  # the marks that it has if it comes back whole
    own_pfn: Any
    own_order: Any
    own_flags: Any
    sg_pfn: Any
    sg_order: Any
    cursor: Any
    zeroed: Any  # what the device said of each entry of the batch
    answered: Any
    flight: Any  # balloon pages in flight, and what the device said of each: -1 nothing yet
    flight_zeroed: Any
    leaving: Any  # and whether each had a mark
    leaving_zeroed: Any
    one: Any  # scratch: one page, for functions that take arrays
    one_zeroed: Any
    rows: Any  # how often each row of the lifecycle table was exercised
    before: Any  # counters before the step
    tally: Any  # what was counted on the lists


# Rows, by number here and by id in `lifecycle`.
ROWS: Final = (
    "drain-set",
    "drain-not",
    "free-zeroed",
    "free-deferred",
    "free-other",
    "merge-both",
    "merge-one",
    "split",
    "claim-block",
    "split-large",
    "move-list",
    "pcp",
    "alloc",
    "alloc-zero",
    "check-failed",
    "isolate-report",
    "inflate-ack",
    "take-off-buddy",
    "put-back-buddy",
    "broken-inside",
    "deflate",
    "hibernate",
    "unisolate",
    "inflate-not",
)
R_DRAIN_SET: Final = 0
R_DRAIN_NOT: Final = 1
R_FREE_ZEROED: Final = 2
R_FREE_DEFERRED: Final = 3
R_FREE_OTHER: Final = 4
R_MERGE_BOTH: Final = 5
R_MERGE_ONE: Final = 6
R_SPLIT: Final = 7
R_CLAIM: Final = 8
R_SPLIT_LARGE: Final = 9
R_MOVE: Final = 10
R_PCP: Final = 11
R_ALLOC: Final = 12
R_ALLOC_ZERO: Final = 13
R_CHECK_FAILED: Final = 14
R_ISOLATE: Final = 15
R_INFLATE: Final = 16
R_TAKE_OFF: Final = 17
R_PUT_BACK: Final = 18
R_BROKEN_INSIDE: Final = 19
R_DEFLATE: Final = 20
R_HIBERNATE: Final = 21
R_UNISOLATE: Final = 22
R_INFLATE_NOT: Final = 23


@inline
def order_of(info: int) -> int:
    return (info >> ORDER_SHIFT) & ORDER_MASK


@compiled
def fail(scene: Scene, code: int, pfn: int, order: int, place: int) -> int:
    """Note what was found; returns the code."""
    scene.problem[CODE] = code
    scene.problem[PFN] = pfn
    scene.problem[ORDER] = order
    scene.problem[PLACE] = place
    scene.problem[WORD] = -1
    return code


@inline
def release(scene: Scene, pfn: int, order: int, zeroed: bool, exact: int) -> None:
    """Say that this step puts a block back, what it is known to be, and its marks if it stays whole."""
    i = scene.ctl[NR_RELEASED]
    scene.rel_pfn[i] = pfn
    scene.rel_order[i] = order
    scene.rel_zeroed[i] = 1 if zeroed else 0
    scene.rel_exact[i] = exact
    scene.ctl[NR_RELEASED] = i + 1
    for page in range(pfn, pfn + (1 << order)):
        scene.source[page] = i + 1
        scene.held[page] = 0


@compiled
def forget_released(scene: Scene) -> None:
    """The step is over: what it released is on a list, or nobody's."""
    for i in range(scene.ctl[NR_RELEASED]):
        for page in range(scene.rel_pfn[i], scene.rel_pfn[i] + (1 << scene.rel_order[i])):
            scene.source[page] = 0
    scene.ctl[NR_RELEASED] = 0


@inline
def block_of(mem: Memory, scene: Scene, half: int, pfn: int) -> int:
    """Return the head of the listed block that holds a page in one shape, or -1."""
    base = half * mem.vm[0].nr_pages
    for order in range(NR_PAGE_ORDERS):
        head = pfn & ~((1 << order) - 1)
        info = scene.shape[base + head]
        if info != 0 and order_of(info) >= order:
            return head
    return -1


@inline
def has_broken(mem: Memory, pfn: int, order: int) -> bool:
    """Return whether a page of a block is broken."""
    if mem.vm[0].num_poisoned_pages != 0:
        for page in range(pfn, pfn + (1 << order)):
            if PageHWPoison(mem, page):
                return True
    return False


@compiled
def _walk_list(
    mem: Memory, scene: Scene, base: int, head: int, kind: int, order: int, migratetype: int
) -> int:
    # Enters the blocks of one list into the present shape; returns how many pages there were, or -1.
    m = mem.mem_map
    nr_pages = mem.vm[0].nr_pages
    past = nr_pages - base  # the other half begins at 0 or at nr_pages
    pages = 0
    before = head
    pfn = list_next(mem, head)
    while pfn != head:
        if pfn < 0 or pfn >= nr_pages or m[pfn].lru_prev != before:
            fail(scene, BAD_LINKS, pfn, 0, head)
            return -1
        own = order
        if kind == DEFERRED:
            own = np.int64(m[pfn].private)  # type: ignore[assignment]
        if own < 0 or own >= NR_PAGE_ORDERS or (pfn & ((1 << own) - 1)) != 0 or pfn + (1 << own) > nr_pages:
            fail(scene, BAD_BLOCK, pfn, own, head)
            return -1
        page_type = PGTY_none
        if kind == FREE:
            page_type = PGTY_buddy
        if kind == BALLOON:
            page_type = PGTY_offline
        if m[pfn].page_type != page_type or (kind == FREE and m[pfn].private != own):
            fail(scene, BAD_BLOCK, pfn, own, head)
            return -1
        for page in range(pfn, pfn + (1 << own), PAGEBLOCK_NR_PAGES):
            if kind == FREE and get_pageblock_migratetype(mem, page) != migratetype:
                fail(scene, WRONG_TYPE, page, own, head)
                return -1
        if scene.shape[base + pfn] != 0:
            fail(scene, TWICE, pfn, own, head)
            return -1
        flags = np.int64(m[pfn].flags_f)
        info = kind | own << ORDER_SHIFT | head << PLACE_SHIFT
        if (flags & PG_zeroed) != 0:
            info |= MARK_ZEROED
        if (flags & PG_reported) != 0:
            info |= MARK_REPORTED
        scene.shape[base + pfn] = info
        if scene.shape[past + pfn] != info:
            scene.changed[scene.ctl[NR_CHANGED]] = pfn
            scene.ctl[NR_CHANGED] += 1
        pages += 1 << own
        before = pfn
        pfn = list_next(mem, pfn)
    if m[head].lru_prev != before:
        fail(scene, BAD_LINKS, head, 0, head)
        return -1
    return pages


@compiled
def walk(mem: Memory, scene: Scene) -> int:
    """Turn the present shape into the past and take the present from the lists.

    Returns DONE, or the code of what is wrong with the lists or their counters. Afterwards
    `scene.changed` holds the heads that are new or have changed.
    """
    vm = mem.vm[0]
    nr_pages = vm.nr_pages
    scene.ctl[NOW] = 1 - scene.ctl[NOW]
    base = scene.ctl[NOW] * nr_pages
    scene.shape[base : base + nr_pages] = 0
    scene.tally[:] = 0
    scene.ctl[NR_CHANGED] = 0
    buddy_end = vm.pcp_heads
    pcp_end = vm.hugetlb_heads
    deferred = vm.trylock_heads
    end = vm.balloon_head + 1
    head = first_busy_head(mem, nr_pages, end)
    while head < end:
        order = 0
        migratetype = 0
        if head < buddy_end:
            kind = FREE
            order = (head - nr_pages) // MIGRATE_TYPES
            migratetype = (head - nr_pages) % MIGRATE_TYPES
        elif head < pcp_end:
            kind = PARKED
            order = pindex_to_order((head - buddy_end) % NR_PCP_LISTS)
        elif head == deferred:
            kind = DEFERRED
        elif head == end - 1:
            kind = BALLOON
        else:
            return fail(scene, NOBODYS, mem.mem_map[head].lru_next, 0, head)
        pages = _walk_list(mem, scene, base, head, kind, order, migratetype)
        if pages < 0:
            return scene.problem[CODE]
        if kind == FREE:
            scene.tally[order] += pages >> order
            if migratetype != MIGRATE_ISOLATE:
                scene.tally[T_FREE] += pages
            if migratetype == MIGRATE_CMA:
                scene.tally[T_CMA] += pages
            if migratetype == MIGRATE_HIGHATOMIC:
                scene.tally[T_HIGHATOMIC] += pages
        elif kind == PARKED:
            scene.tally[T_CPUS + (head - buddy_end) // NR_PCP_LISTS] += pages
        elif kind == DEFERRED:
            scene.tally[T_DEFERRED] = pages
        else:
            scene.tally[T_BALLOON] = pages
        head = first_busy_head(mem, head + 1, end)
    return _check_counters(mem, scene)


@compiled
def _check_counters(mem: Memory, scene: Scene) -> int:
    vm = mem.vm[0]
    zone = mem.zone[0]
    tally = scene.tally
    for order in range(NR_PAGE_ORDERS):
        if tally[order] != zone.nr_free[order]:
            return fail(scene, BAD_COUNT, -1, order, free_list(mem, 0, order, 0))
    if tally[T_FREE] != zone.nr_free_pages or tally[T_CMA] != zone.nr_free_cma:
        return fail(scene, BAD_COUNT, -1, -1, -1)
    if tally[T_HIGHATOMIC] != zone.nr_free_highatomic:
        return fail(scene, BAD_COUNT, -1, -1, -1)
    for cpu in range(vm.nr_cpus):
        if tally[T_CPUS + cpu] != mem.pcp[pcp_of(mem, 0, cpu)].count:
            return fail(scene, BAD_COUNT, -1, -1, pcp_list(mem, 0, cpu, 0))
    if tally[T_DEFERRED] != zone.nr_trylock_free:
        return fail(scene, BAD_COUNT, -1, -1, vm.trylock_heads)
    if tally[T_BALLOON] != vm.nr_balloon_pages:
        return fail(scene, BAD_COUNT, -1, -1, vm.balloon_head)
    return DONE


@compiled
def _check_claim(mem: Memory, scene: Scene, pfn: int, order: int, place: int) -> int:
    # Owners write words 0, 255 and 511 of a page (`steps`), and poison fills it: three looks do.
    # Small blocks are read whole all the same.
    if order <= 2:
        word = first_dirty_word(mem, pfn * WORDS_PER_PAGE, (pfn + (1 << order)) * WORDS_PER_PAGE)
        if word >= 0:
            fail(scene, FALSE_ZERO, pfn, order, place)
            scene.problem[WORD] = word
            return FALSE_ZERO
        return DONE
    for page in range(pfn, pfn + (1 << order)):
        first = page * WORDS_PER_PAGE
        for at in range(3):
            word = first + (WORDS_PER_PAGE - 1) * at // 2
            if mem.ram[word] != 0:
                fail(scene, FALSE_ZERO, pfn, order, place)
                scene.problem[WORD] = word
                return FALSE_ZERO
    return DONE


@compiled
def _check_record(mem: Memory, scene: Scene, pfn: int, order: int, kind: int, place: int, deep: bool) -> int:
    # No trace of an owner on a listed block. `deep` looks at its tails as well.
    m = mem.mem_map
    end = pfn + 1
    if deep:
        end = pfn + (1 << order)
    for page in range(pfn, end):
        allowed = 0
        if page == pfn:
            allowed = PG_zeroed
            if kind == FREE:
                allowed = PG_zeroed | PG_reported
        if kind == BALLOON:
            if m[page]._refcount != 1:
                return fail(scene, DIRTY_RECORD, page, order, place)
        elif m[page]._refcount != 0 or m[page].mapping != 0 or mem.compound_head[page] != 0:
            return fail(scene, DIRTY_RECORD, page, order, place)
        if (m[page].flags_f & PAGE_FLAGS_CHECK_AT_PREP & ~allowed) != 0 or m[page]._mapcount != -1:
            return fail(scene, DIRTY_RECORD, page, order, place)
        if page != pfn and m[page].page_type != PGTY_none:
            return fail(scene, DIRTY_RECORD, page, order, place)
    return DONE


@compiled
def _check_alone(mem: Memory, scene: Scene, pfn: int, order: int, place: int) -> int:
    # No other block inside this one, and this one inside no other.
    base = scene.ctl[NOW] * mem.vm[0].nr_pages
    for page in range(pfn + 1, pfn + (1 << order)):
        if scene.shape[base + page] != 0:
            return fail(scene, TWICE, page, order, place)
    for larger in range(order + 1, NR_PAGE_ORDERS):
        head = pfn & ~((1 << larger) - 1)
        info = scene.shape[base + head]
        if head != pfn and info != 0 and order_of(info) >= larger:
            return fail(scene, TWICE, pfn, order, place)
    return DONE


@compiled
def _expected_marks(mem: Memory, scene: Scene, pfn: int, order: int, kind: int) -> int:
    # The law. Returns the marks that a changed block must have, or -1 if it comes from nowhere.
    nr_pages = mem.vm[0].nr_pages
    past = (1 - scene.ctl[NOW]) * nr_pages
    head = block_of(mem, scene, 1 - scene.ctl[NOW], pfn)
    if head >= 0:
        info = scene.shape[past + head]
        if order_of(info) >= order and info & KIND_MASK != BALLOON:
            if info & KIND_MASK == DEFERRED and has_broken(mem, head, order_of(info)):
                return 0  # its healthy pages come back one by one, and nothing is known of them
            _count_part(scene, info, order, kind)
            if kind == FREE and info & KIND_MASK == FREE:
                return info & MARKS
            return info & MARK_ZEROED
    parts = 0
    known = 0
    exact = 0
    pfn_end = pfn + (1 << order)
    at = pfn
    while at < pfn_end:
        info = scene.shape[past + at]
        if info != 0 and info & KIND_MASK != BALLOON:
            known += 1 if (info & MARK_ZEROED) != 0 else 0
            at += 1 << order_of(info)
        else:
            i = scene.source[at] - 1
            if i < 0:
                scene.problem[PFN] = at
                return -1
            known += scene.rel_zeroed[i]
            exact = scene.rel_exact[i]
            if scene.rel_pfn[i] != pfn or scene.rel_order[i] != order:
                exact = MARK_ZEROED if scene.rel_zeroed[i] != 0 else 0
                if exact != 0 and scene.rel_order[i] > PAGEBLOCK_ORDER:
                    scene.rows[R_SPLIT_LARGE] += 1
            at = min(scene.rel_pfn[i] + (1 << scene.rel_order[i]), pfn_end)
        parts += 1
    if parts == 1:
        return exact
    if known == parts:
        scene.rows[R_MERGE_BOTH] += 1
        return MARK_ZEROED
    if known > 0:
        scene.rows[R_MERGE_ONE] += 1
    return 0


@inline
def _count_part(scene: Scene, info: int, order: int, kind: int) -> None:
    if (info & MARK_ZEROED) == 0:
        return
    if kind == PARKED:
        scene.rows[R_PCP] += 1
    elif order_of(info) > PAGEBLOCK_ORDER and order == PAGEBLOCK_ORDER:
        scene.rows[R_SPLIT_LARGE] += 1
    elif order_of(info) > order:
        scene.rows[R_SPLIT] += 1
    elif kind == info & KIND_MASK:
        scene.rows[R_MOVE] += 1


@compiled
def check_changed(mem: Memory, scene: Scene) -> int:
    """Hold every changed block against the law; returns DONE or a code."""
    base = scene.ctl[NOW] * mem.vm[0].nr_pages
    past = mem.vm[0].nr_pages - base
    for n in range(scene.ctl[NR_CHANGED]):
        pfn = scene.changed[n]
        info = scene.shape[base + pfn]
        kind = info & KIND_MASK
        order = order_of(info)
        place = info >> PLACE_SHIFT
        marks = info & MARKS
        head = block_of(mem, scene, 1 - scene.ctl[NOW], pfn)
        part = head >= 0 and order_of(scene.shape[past + head]) >= order
        code = _check_record(mem, scene, pfn, order, kind, place, not part)
        if code == DONE:
            code = _check_alone(mem, scene, pfn, order, place)
        if code != DONE:
            return code
        if kind == BALLOON:
            # A page enters without a mark and gets one when the device's answer is taken in.
            expected = 0
            if scene.source[pfn] != 0:
                expected = scene.rel_exact[scene.source[pfn] - 1]
            elif scene.shape[past + pfn] & KIND_MASK == BALLOON:
                expected = scene.shape[past + pfn] & MARKS
        else:
            for page in range(pfn, pfn + (1 << order)):
                if scene.held[page] != 0:
                    return fail(scene, OWNED, page, order, place)
            expected = _expected_marks(mem, scene, pfn, order, kind)
            if expected < 0:
                return fail(scene, NOBODYS, pfn, order, place)
            over = scene.ctl[OVER_PFN]
            if over >= 0 and over <= pfn < over + (1 << scene.ctl[OVER_ORDER]):
                expected = 0
        if (marks & MARK_ZEROED) != 0:
            code = _check_claim(mem, scene, pfn, order, place)
            if code != DONE:
                return code
        if marks != expected:
            scene.problem[EXPECTED] = expected
            scene.problem[FOUND] = marks
            if (marks & ~expected & MARK_ZEROED) != 0:
                return fail(scene, INVENTED, pfn, order, place)
            if (marks & ~expected & MARK_REPORTED) != 0:
                return fail(scene, FALSELY_TOLD, pfn, order, place)
            if scene.ctl[LOSSY] == 0:
                if (expected & MARK_ZEROED) != (marks & MARK_ZEROED):
                    return fail(scene, FORGOTTEN, pfn, order, place)
                return fail(scene, TOLD_AGAIN, pfn, order, place)
    return DONE


@far
def check_all(mem: Memory, scene: Scene) -> int:
    """Look at every listed block as if it were new, and see that no page is missing.

    The law is left out: nothing has happened since the last step. Returns DONE or a code.
    """
    vm = mem.vm[0]
    base = scene.ctl[NOW] * vm.nr_pages
    listed = 0
    held = 0
    for pfn in range(vm.nr_pages):
        if scene.held[pfn] != 0:
            held += 1
        info = scene.shape[base + pfn]
        if info == 0:
            continue
        kind = info & KIND_MASK
        order = order_of(info)
        place = info >> PLACE_SHIFT
        if kind != BALLOON:
            listed += 1 << order
        code = _check_record(mem, scene, pfn, order, kind, place, True)
        if code == DONE:
            code = _check_alone(mem, scene, pfn, order, place)
        if code == DONE and (info & MARK_ZEROED) != 0:
            code = _check_claim(mem, scene, pfn, order, place)
        if code != DONE:
            return code
        if kind == FREE and order < NR_PAGE_ORDERS - 1:
            buddy = pfn ^ (1 << order)
            other = scene.shape[base + buddy] if buddy + (1 << order) <= vm.nr_pages else 0
            if other & KIND_MASK == FREE and order_of(other) == order:
                if (1 << order) < PAGEBLOCK_NR_PAGES:
                    return fail(scene, UNMERGED, pfn, order, place)
    if vm.nr_bad_pages == 0 and vm.num_poisoned_pages == 0 and listed + held != vm.nr_pages:
        return fail(scene, MISSING, -1, -1, -1)
    return DONE
