# SPDX-License-Identifier: GPL-2.0-only
"""Steps of the balloon: pages are taken, answered, acknowledged, leave and are freed."""

from __future__ import annotations

from hostzero.check.small.layout import (
    DONE,
    IN_FLIGHT,
    LEAVING,
    MARK_ZEROED,
    NOBODYS,
    NOT_NOW,
    NOW,
    R_DEFLATE,
    R_INFLATE,
    R_INFLATE_NOT,
    SETUP,
    Scene,
    fail,
    release,
)
from hostzero.check.small.owner_steps import check_given
from hostzero.check.small.settle import begin, give_back, hold, settle
from hostzero.check.small.step_codes import FAILS, H_BALLOON, S_BALLOON, S_PAGE_HINTS, S_RECLAIM, ZEROES
from hostzero.jit import compiled
from hostzero.mm.balloon import (
    balloon_page_list_dequeue,
    balloon_page_list_enqueue,
    balloon_release,
    balloon_set_zeroed,
)
from hostzero.mm.clear_page import clear_pages
from hostzero.mm.gfp import (
    __GFP_DIRECT_RECLAIM,
    __GFP_NOMEMALLOC,
    __GFP_NORETRY,
    __GFP_NOWARN,
    GFP_HIGHUSER_MOVABLE,
    USER_ADDR_NONE,
)
from hostzero.mm.mmzone import NO_PAGE, Memory
from hostzero.mm.page_alloc import alloc_pages


@compiled
def balloon_take(mem: Memory, scene: Scene, cpu: int) -> int:
    """Take a page into the balloon; the device has not answered yet."""
    n = scene.ctl[IN_FLIGHT]
    room = scene.ctl[SETUP + S_BALLOON]
    if mem.vm[0].nr_balloon_pages + scene.ctl[LEAVING] >= room or scene.ctl[LEAVING] != 0:
        return NOT_NOW
    gfp = GFP_HIGHUSER_MOVABLE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC
    if scene.ctl[SETUP + S_RECLAIM] == 0:
        gfp &= ~__GFP_DIRECT_RECLAIM
    begin(mem, scene)
    pfn = alloc_pages(mem, gfp, 0, USER_ADDR_NONE, 0, cpu)
    code = settle(mem, scene)
    if code != DONE or pfn == NO_PAGE:
        return code
    code = check_given(mem, scene, pfn, 0, gfp)
    if code != DONE:
        return code
    hold(scene, pfn, 0, H_BALLOON)
    scene.flight[n] = pfn
    scene.flight_zeroed[n] = -1
    scene.ctl[IN_FLIGHT] = n + 1
    begin(mem, scene)
    scene.one[0] = pfn
    balloon_page_list_enqueue(mem, scene.one)
    return settle(mem, scene)


@compiled
def balloon_answer(mem: Memory, scene: Scene, entry: int, how: int) -> int:
    """Answer for one page that is in flight."""
    if entry >= scene.ctl[IN_FLIGHT] or scene.flight_zeroed[entry] >= 0:
        return NOT_NOW
    if how != FAILS:
        clear_pages(mem, scene.flight[entry], 1)
    scene.flight_zeroed[entry] = 1 if how == ZEROES else 0
    return DONE


@compiled
def balloon_ack(mem: Memory, scene: Scene) -> int:
    """Take the answers in, when all are there."""
    n = scene.ctl[IN_FLIGHT]
    if n == 0:
        return NOT_NOW
    for i in range(n):
        if scene.flight_zeroed[i] < 0:
            return NOT_NOW
    begin(mem, scene)
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
    return settle(mem, scene)


@compiled
def balloon_leave(mem: Memory, scene: Scene) -> int:
    """Take the newest page out of the balloon; the host has been told, and it is not free yet."""
    n = scene.ctl[LEAVING]
    if scene.ctl[IN_FLIGHT] != 0 or mem.vm[0].nr_balloon_pages == 0:
        return NOT_NOW
    begin(mem, scene)
    if balloon_page_list_dequeue(mem, scene.one) == 0:
        return fail(scene, NOBODYS, -1, 0, -1)
    pfn = scene.one[0]
    info = scene.shape[scene.ctl[NOW] * mem.vm[0].nr_pages + pfn]
    scene.leaving[n] = pfn
    scene.leaving_zeroed[n] = 1 if (info & MARK_ZEROED) != 0 else 0
    scene.ctl[LEAVING] = n + 1
    return settle(mem, scene)


@compiled
def balloon_free(mem: Memory, scene: Scene, cpu: int) -> int:
    """Free the pages that have left."""
    n = scene.ctl[LEAVING]
    if n == 0:
        return NOT_NOW
    begin(mem, scene)
    for i in range(n):
        zeroed = scene.leaving_zeroed[i] != 0 and mem.vm[0].page_poisoning == 0
        if zeroed:
            scene.rows[R_DEFLATE] += 1
        give_back(mem, scene, scene.leaving[i], 0, zeroed, MARK_ZEROED if zeroed else 0)
    for i in range(n):
        scene.one[0] = scene.leaving[i]
        balloon_release(mem, scene.one, cpu)
    scene.ctl[LEAVING] = 0
    return settle(mem, scene)
