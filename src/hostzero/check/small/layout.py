# SPDX-License-Identifier: GPL-2.0-only
"""How the state of a small guest is laid out: what its scene holds, and what its numbers mean.

Compiled code makes no objects, so everything besides `Memory` is in arrays of 64-bit integers.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from hostzero.jit import COMPILER_ON, compiled, inline
from hostzero.mm.mmzone import NR_PAGE_ORDERS, Memory
from hostzero.mm.page_flags import PageHWPoison

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
CAME_BACK: Final = 14  # a block that the host may want to hear of, plus one: it came back in this step
QUIET: Final = 15  # blocks come back in this step of which nobody is told (FPI_SKIP_REPORT_NOTIFY)
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
NOT_ASKED: Final = 122

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


if COMPILER_ON:

    @compiled
    def first_set(array: Any, start: int, end: int) -> int:
        """Return the first place in `[start, end)` that is not 0, or -1."""
        at = start
        # Eight at a time, a cache line: the compiler makes few and wide instructions of it.
        while at + 8 <= end:
            any_bit = array[at] | array[at + 1] | array[at + 2] | array[at + 3]
            any_bit |= array[at + 4] | array[at + 5] | array[at + 6] | array[at + 7]
            if any_bit != 0:
                break
            at += 8
        while at < end:
            if array[at] != 0:
                return at
            at += 1
        return -1

else:

    def first_set(array: Any, start: int, end: int) -> int:
        """Return the first place in `[start, end)` that is not 0, or -1."""
        (places,) = array[start:end].nonzero()
        return int(start + places[0]) if len(places) else -1


@inline
def order_of(info: int) -> int:
    """Return the order in a packed entry of a shape."""
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
    scene.source[pfn : pfn + (1 << order)] = i + 1
    scene.held[pfn : pfn + (1 << order)] = 0


@compiled
def forget_released(scene: Scene) -> None:
    """The step is over: what it released is on a list, or nobody's."""
    for i in range(scene.ctl[NR_RELEASED]):
        pfn = scene.rel_pfn[i]
        scene.source[pfn : pfn + (1 << scene.rel_order[i])] = 0
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
