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

from hostzero.check.small.layout import (
    BALLOON,
    CAME_BACK,
    DEFERRED,
    DIRTY_RECORD,
    DONE,
    EXPECTED,
    FALSE_ZERO,
    FALSELY_TOLD,
    FORGOTTEN,
    FOUND,
    FREE,
    INVENTED,
    KIND_MASK,
    LOSSY,
    MARK_REPORTED,
    MARK_ZEROED,
    MARKS,
    MISSING,
    NOBODYS,
    NOW,
    NR_CHANGED,
    OVER_ORDER,
    OVER_PFN,
    OWNED,
    PARKED,
    PFN,
    PLACE_SHIFT,
    R_MERGE_BOTH,
    R_MERGE_ONE,
    R_MOVE,
    R_PCP,
    R_SPLIT,
    R_SPLIT_LARGE,
    TOLD_AGAIN,
    TWICE,
    UNMERGED,
    WORD,
    Scene,
    block_of,
    fail,
    first_set,
    has_broken,
    order_of,
)
from hostzero.jit import compiled, far, inline
from hostzero.mm.mmzone import NR_PAGE_ORDERS, PAGEBLOCK_NR_PAGES, PAGEBLOCK_ORDER, WORDS_PER_PAGE, Memory
from hostzero.mm.page_flags import PAGE_FLAGS_CHECK_AT_PREP, PG_reported, PG_zeroed, PGTY_none


@compiled
def _check_claim(mem: Memory, scene: Scene, pfn: int, order: int, place: int) -> int:
    # Owners write words 0, 255 and 511 of a page (`steps`), and poison fills it: three looks do.
    # Small blocks are read whole all the same.
    if order <= 2:
        word = first_set(mem.ram, pfn * WORDS_PER_PAGE, (pfn + (1 << order)) * WORDS_PER_PAGE)
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
    inside = first_set(scene.shape, base + pfn + 1, base + pfn + (1 << order))
    if inside >= 0:
        return fail(scene, TWICE, inside - base, order, place)
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
            if kind == FREE and info & KIND_MASK != FREE and order >= mem.vm[0].page_reporting_order:
                scene.ctl[CAME_BACK] = pfn + 1
            if kind == FREE and info & KIND_MASK == FREE:
                return info & MARKS
            return info & MARK_ZEROED
    if kind == FREE and order >= mem.vm[0].page_reporting_order:
        scene.ctl[CAME_BACK] = pfn + 1
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
            page = first_set(scene.held, pfn, pfn + (1 << order))
            if page >= 0:
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
