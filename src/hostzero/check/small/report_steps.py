# SPDX-License-Identifier: GPL-2.0-only
"""Steps of a report: filled, handed over, answered entry by entry, drained."""

from __future__ import annotations

from hostzero.check.small.layout import (
    BATCH_STAGE,
    BATCH_START,
    DONE,
    FREE,
    KIND_MASK,
    MARK_REPORTED,
    MARK_ZEROED,
    NOBODYS,
    NOT_NOW,
    NOW,
    OWNER_FLAGS,
    QUIET,
    R_DRAIN_NOT,
    R_DRAIN_SET,
    R_ISOLATE,
    SETUP,
    TOLD_AGAIN,
    Scene,
    fail,
    order_of,
)
from hostzero.check.small.settle import begin, give_back, hold, settle
from hostzero.check.small.step_codes import H_BATCH, PARTLY, S_CAPACITY, ZEROES
from hostzero.jit import compiled
from hostzero.mm.buddy import PAGE_REPORTING_IDLE
from hostzero.mm.clear_page import clear_pages
from hostzero.mm.mmzone import MIGRATE_PCPTYPES, Memory
from hostzero.mm.page_flags import PAGE_FLAGS_CHECK_AT_PREP
from hostzero.mm.page_reporting import page_reporting_drain, page_reporting_fill


@compiled
def report_fill(mem: Memory, scene: Scene, order: int, migratetype: int) -> int:
    """Isolate blocks of one list for the batch."""
    start = scene.ctl[BATCH_START]
    if scene.ctl[BATCH_STAGE] > 1 or start == 0 or migratetype >= MIGRATE_PCPTYPES + 2:
        return NOT_NOW
    if order < mem.vm[0].page_reporting_order or mem.zone[0].nr_free[order] == 0:
        return NOT_NOW
    begin(mem, scene)
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
        hold(scene, pfn, scene.sg_order[i], H_BATCH)
    scene.ctl[BATCH_START] = scene.cursor[0]
    if scene.cursor[0] < start:
        scene.ctl[BATCH_STAGE] = 1
    return settle(mem, scene)


@compiled
def report_send(scene: Scene) -> int:
    """Hand the batch over: nothing is added any more."""
    if scene.ctl[BATCH_STAGE] != 1:
        return NOT_NOW
    scene.ctl[BATCH_STAGE] = 2
    return DONE


@compiled
def report_answer(mem: Memory, scene: Scene, entry: int, how: int) -> int:
    """Answer one entry; bits count from the first entry of the call, a batch is filled from its end."""
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
def report_drain(mem: Memory, scene: Scene, good: int) -> int:
    """Put the batch back, and mark what was answered."""
    if scene.ctl[BATCH_STAGE] != 2:
        return NOT_NOW
    capacity = scene.ctl[SETUP + S_CAPACITY]
    start = scene.ctl[BATCH_START]
    for i in range(start, capacity):
        if scene.answered[i] == 0:
            if good != 0:
                return NOT_NOW
            scene.zeroed[i - start] = 0
    begin(mem, scene)
    scene.ctl[QUIET] = 1
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
        give_back(mem, scene, scene.sg_pfn[i], scene.sg_order[i], False, exact)
    page_reporting_drain(mem, scene.sg_pfn, scene.sg_order, start, capacity, good != 0, scene.zeroed)
    scene.ctl[BATCH_START] = capacity
    scene.ctl[BATCH_STAGE] = 0
    mem.vm[0].page_reporting_state = PAGE_REPORTING_IDLE  # the pass is over
    return settle(mem, scene)
