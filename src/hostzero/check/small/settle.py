# SPDX-License-Identifier: GPL-2.0-only
"""The beginning and the end of a step: what it puts back is announced, what it did is looked at."""

from __future__ import annotations

from hostzero.check.small.layout import (
    BAD_PAGE,
    CAME_BACK,
    DONE,
    LOSSY,
    NOT_ASKED,
    NR_RELEASED,
    OVER_PFN,
    POISON,
    QUIET,
    R_BROKEN_INSIDE,
    R_CHECK_FAILED,
    STEPS,
    Scene,
    fail,
    forget_released,
    has_broken,
    release,
)
from hostzero.check.small.list_walk import walk
from hostzero.check.small.oracle import check_changed
from hostzero.check.small.step_codes import B_BAD, B_STALLS, B_STATE, B_ZEROED, H_BROKEN
from hostzero.jit import compiled, inline
from hostzero.mm.buddy import PAGE_REPORTING_IDLE
from hostzero.mm.mmzone import WORDS_PER_PAGE, Memory
from hostzero.mm.page_flags import PageHWPoison


@inline
def hold(scene: Scene, pfn: int, order: int, who: int) -> None:
    """Note who has the pages of a block now."""
    scene.held[pfn : pfn + (1 << order)] = who


@inline
def write(mem: Memory, pfn: int, order: int) -> None:
    """Write to a block as its owner: three words of each page."""
    first = pfn * WORDS_PER_PAGE
    end = (pfn + (1 << order)) * WORDS_PER_PAGE
    mem.ram[first:end:WORDS_PER_PAGE] = 0x5A5A
    mem.ram[first + 255 : end : WORDS_PER_PAGE] = 0x5A5A
    mem.ram[first + 511 : end : WORDS_PER_PAGE] = 0x5A5A


@compiled
def give_back(mem: Memory, scene: Scene, pfn: int, order: int, zeroed: bool, exact: int) -> None:
    """Announce a block as `release` does, without its broken pages; with some, nothing is known of it."""
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
def settle(mem: Memory, scene: Scene) -> int:
    """Look at everything that a step did; returns DONE or a code."""
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
    if scene.ctl[CAME_BACK] != 0 and scene.ctl[QUIET] == 0 and vm.page_reporting_enabled != 0:
        if scene.before[B_STATE] == PAGE_REPORTING_IDLE and vm.page_reporting_state == PAGE_REPORTING_IDLE:
            return fail(scene, NOT_ASKED, scene.ctl[CAME_BACK] - 1, vm.page_reporting_order, -1)
    return DONE


@compiled
def begin(mem: Memory, scene: Scene) -> None:
    """Begin a step: nothing is announced, and counters are noted."""
    vm = mem.vm[0]
    scene.ctl[LOSSY] = 0
    scene.ctl[OVER_PFN] = -1
    scene.ctl[CAME_BACK] = 0
    scene.ctl[QUIET] = 0
    scene.before[B_STATE] = vm.page_reporting_state
    scene.ctl[NR_RELEASED] = 0
    scene.ctl[STEPS] += 1
    scene.before[B_ZEROED] = vm.zeroed_bytes
    scene.before[B_STALLS] = vm.allocstall + vm.compact_stall
    scene.before[B_BAD] = vm.nr_bad_pages
