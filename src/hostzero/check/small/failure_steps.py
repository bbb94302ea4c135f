# SPDX-License-Identifier: GPL-2.0-only
"""Steps that happen to a guest: pages break, memory is lost, devices change, pageblocks are isolated."""

from __future__ import annotations

from hostzero.check.small.layout import (
    BATCH_STAGE,
    BROKEN,
    DONE,
    FREE,
    KIND_MASK,
    LEAVING,
    LOSSY,
    MARK_ZEROED,
    NOBODYS,
    NOT_NOW,
    NOW,
    OVER_ORDER,
    OVER_PFN,
    QUIET,
    R_HIBERNATE,
    R_PUT_BACK,
    R_TAKE_OFF,
    R_UNISOLATE,
    Scene,
    block_of,
    fail,
    order_of,
    release,
)
from hostzero.check.small.oracle import check_all
from hostzero.check.small.settle import begin, settle, write
from hostzero.check.small.step_codes import H_BROKEN
from hostzero.jit import compiled
from hostzero.mm.memory_failure import is_free_buddy_page, put_page_back_buddy, take_page_off_buddy
from hostzero.mm.mmzone import PAGEBLOCK_NR_PAGES, Memory, get_pageblock_isolate
from hostzero.mm.page_flags import PageHWPoison, PG_hwpoison, compound_head
from hostzero.mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    start_isolate_page_range,
    undo_isolate_page_range,
)
from hostzero.mm.pcplist import drain_all_pages
from hostzero.mm.snapshot import forget_zero_claims


@compiled
def break_page(mem: Memory, scene: Scene, pfn: int) -> int:
    """Mark a page as broken: `TestSetPageHWPoison` under the zone lock (patch 2), with nobody in between."""
    if scene.ctl[BROKEN] != 0 or pfn >= mem.vm[0].nr_pages or PageHWPoison(mem, pfn):
        return NOT_NOW
    mem.mem_map[pfn].flags_f |= PG_hwpoison
    mem.vm[0].num_poisoned_pages += 1
    scene.ctl[BROKEN] = pfn + 1
    return DONE


@compiled
def break_handle(mem: Memory, scene: Scene) -> int:
    """Deal with the page that broke: a free one is taken off its block."""
    pfn = scene.ctl[BROKEN] - 1
    if pfn < 0:
        return NOT_NOW
    scene.ctl[BROKEN] = 0
    if mem.mem_map[compound_head(mem, pfn)]._refcount != 0:
        return DONE  # its owner keeps it; it stays out once it is freed
    begin(mem, scene)
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
    return settle(mem, scene)


@compiled
def break_mend(mem: Memory, scene: Scene, pfn: int) -> int:
    """Take a broken page back into use."""
    if pfn >= mem.vm[0].nr_pages or scene.held[pfn] != H_BROKEN or scene.ctl[BROKEN] == pfn + 1:
        return NOT_NOW
    begin(mem, scene)
    scene.rows[R_PUT_BACK] += 1
    write(mem, pfn, 0)
    release(scene, pfn, 0, False, 0)
    if not put_page_back_buddy(mem, pfn):
        return fail(scene, NOBODYS, pfn, 0, -1)
    mem.vm[0].num_poisoned_pages -= 1
    return settle(mem, scene)


@compiled
def hibernate_step(mem: Memory, scene: Scene) -> int:
    """Come back from an image: the device was gone, no report under way, the balloon empty."""
    if scene.ctl[BATCH_STAGE] != 0 or scene.ctl[LEAVING] != 0 or mem.vm[0].nr_balloon_pages != 0:
        return NOT_NOW
    vm = mem.vm[0]
    base = scene.ctl[NOW] * vm.nr_pages
    for pfn in range(vm.nr_pages):
        info = scene.shape[base + pfn]
        if info != 0:
            write(mem, pfn, order_of(info))
            if (info & MARK_ZEROED) != 0:
                scene.rows[R_HIBERNATE] += 1
    begin(mem, scene)
    forget_zero_claims(mem)
    scene.ctl[LOSSY] = 1
    code = settle(mem, scene)
    if code != DONE:
        return code
    return check_all(mem, scene)


@compiled
def trust_step(mem: Memory, scene: Scene, on: int) -> int:
    """Be given another device, with or without bit 6; no report is under way when it comes."""
    if scene.ctl[BATCH_STAGE] != 0 or mem.vm[0].page_reporting_host_zeroes == on:
        return NOT_NOW
    if mem.vm[0].page_poisoning != 0:
        return NOT_NOW
    mem.vm[0].page_reporting_host_zeroes = on
    return DONE


@compiled
def isolate_step(mem: Memory, scene: Scene, block: int, on: bool) -> int:
    """Isolate a pageblock, or make it an ordinary one again."""
    start = block * PAGEBLOCK_NR_PAGES
    if start + PAGEBLOCK_NR_PAGES > mem.vm[0].nr_pages:
        return NOT_NOW
    begin(mem, scene)
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
        scene.ctl[QUIET] = 1
        info = scene.shape[scene.ctl[NOW] * mem.vm[0].nr_pages + start]
        if get_pageblock_isolate(mem, start) and info & KIND_MASK == FREE and (info & MARK_ZEROED) != 0:
            scene.rows[R_UNISOLATE] += 1
        undo_isolate_page_range(mem, start, start + PAGEBLOCK_NR_PAGES)
    return settle(mem, scene)
