# SPDX-License-Identifier: GPL-2.0-only
"""The compiled loop of the random search: draws a step, does it, writes it down."""

from __future__ import annotations

from typing import Final

from hostzero.check.small import step_codes
from hostzero.check.small.layout import (
    BATCH_START,
    BROKEN,
    DONE,
    IN_FLIGHT,
    NOT_NOW,
    NR_OWNED,
    SETUP,
    STATE,
    STEPS,
    Scene,
)
from hostzero.check.small.oracle import check_all
from hostzero.check.small.step_codes import (
    ALLOC,
    BALLOON_ANSWER,
    BREAK,
    BREAK_MEND,
    DIRTY,
    FREE_BLOCK,
    H_BROKEN,
    ISOLATE,
    NOLOCK,
    NR_HOWS,
    REPORT_ANSWER,
    REPORT_DRAIN,
    REPORT_FILL,
    S_CAPACITY,
    TRUST,
    UNISOLATE,
    ZEROES,
)
from hostzero.check.small.steps import act
from hostzero.jit import compiled, inline
from hostzero.mm.list import list_empty
from hostzero.mm.mmzone import NR_PAGE_ORDERS, PAGEBLOCK_NR_PAGES, Memory, free_list

# What the loop reports besides codes of the oracle.
COUNT: Final = 0  # rows of the log that are used
MAX_ORDER: Final = 1
CPUS: Final = 2
TOTAL: Final = 3  # of the weights
DEEP_EVERY: Final = 4  # steps between two looks at everything
REFUSED: Final = 5  # draws that were not possible
UNIFORM: Final = 6  # large blocks are as likely as small ones
NR_LOOP: Final = 8


@inline
def _random(scene: Scene, below: int) -> int:
    # xorshift64*, without the multiplication: good enough to choose, the same everywhere.
    x = scene.ctl[STATE]
    x ^= x << 13
    x ^= (x >> 7) & 0x01FF_FFFF_FFFF_FFFF
    x ^= x << 17
    scene.ctl[STATE] = x
    return ((x >> 11) & 0xFFFF_FFFF) % below


@inline
def _skewed(scene: Scene, below: int) -> int:
    # Small numbers are likelier than large ones: half of the draws are 0, a quarter 1, ...
    value = 0
    while value < below - 1 and _random(scene, 2) == 0:
        value += 1
    return value


@compiled
def _draw(mem: Memory, scene: Scene, loop: object, weights: object, row: object) -> None:
    at = _random(scene, loop[TOTAL])  # type: ignore[index]
    op = 0
    while at >= weights[op]:  # type: ignore[index]
        at -= weights[op]  # type: ignore[index]
        op += 1
    a = 0
    b = 0
    c = 0
    cpus = loop[CPUS]  # type: ignore[index]
    if cpus > 1:
        c = _random(scene, cpus)
    if op == ALLOC:
        if loop[UNIFORM] != 0:  # type: ignore[index]
            a = _random(scene, loop[MAX_ORDER] + 1)  # type: ignore[index]
        else:
            a = _skewed(scene, loop[MAX_ORDER] + 1)  # type: ignore[index]
        b = _random(scene, 16)
    elif op == FREE_BLOCK:
        a = _random(scene, max(scene.ctl[NR_OWNED], 1))
        b = _random(scene, NR_HOWS)
        if b >= NOLOCK and _random(scene, 4) != 0:
            b = DIRTY  # deferred blocks wait for a free of another kind: they must not be all there is
    elif op == REPORT_FILL:
        # The next list from somewhere on that has a block: most are empty.
        low = mem.vm[0].page_reporting_order
        a = low + _random(scene, NR_PAGE_ORDERS - low)
        b = _random(scene, 3)
        for _ in range(3 * NR_PAGE_ORDERS):
            if not list_empty(mem, free_list(mem, 0, a, b)):
                break
            b = (b + 1) % 3
            if b == 0:
                a = a + 1 if a + 1 < NR_PAGE_ORDERS else low
    elif op == REPORT_ANSWER:
        # The next entry that has no answer; three of five answers are good.
        a = 0
        while scene.ctl[BATCH_START] + a < scene.ctl[SETUP + S_CAPACITY] - 1:
            if scene.answered[scene.ctl[BATCH_START] + a] == 0 and _random(scene, 2) == 0:
                break
            a += 1
        b = _random(scene, 5)
        if b > 2:
            b = ZEROES
    elif op == REPORT_DRAIN:
        a = min(_random(scene, 8), 1)
    elif op == BALLOON_ANSWER:
        a = _random(scene, max(scene.ctl[IN_FLIGHT], 1))
        b = _random(scene, 4)
        if b > 2:
            b = ZEROES
    elif op == BREAK:
        a = _random(scene, mem.vm[0].nr_pages)
    elif op == BREAK_MEND:
        # The next broken page from somewhere on: most pages are not.
        a = _random(scene, mem.vm[0].nr_pages)
        for _ in range(mem.vm[0].nr_pages):
            if scene.held[a] == H_BROKEN and scene.ctl[BROKEN] != a + 1:
                break
            a += 1
            if a == mem.vm[0].nr_pages:
                a = 0
    elif op == TRUST:
        a = _random(scene, 2)
    elif op == ISOLATE or op == UNISOLATE:
        a = _random(scene, max(mem.vm[0].nr_pages // PAGEBLOCK_NR_PAGES, 1))
    row[0] = op  # type: ignore[index]
    row[1] = a  # type: ignore[index]
    row[2] = b  # type: ignore[index]
    row[3] = c  # type: ignore[index]


@compiled
def run_steps(
    mem: Memory, scene: Scene, loop: object, weights: object, log: object, row: object, count: int
) -> int:
    """Do up to `count` more random steps; return DONE or the code of what was found.

    `log` gets a row for each step that was possible, four numbers one after the other; the step
    that found something, or that raised, is the last.

    Raises:
        VmBug: an assertion of the allocator failed.
    """
    end = min(loop[COUNT] + count, len(log) // 4)  # type: ignore[index,arg-type]
    while loop[COUNT] < end:  # type: ignore[index]
        _draw(mem, scene, loop, weights, row)
        at = 4 * loop[COUNT]  # type: ignore[index]
        for i in range(4):
            log[at + i] = row[i]  # type: ignore[index]
        loop[COUNT] += 1  # type: ignore[index]
        code = act(mem, scene, row[0], row[1], row[2], row[3])  # type: ignore[index]
        if code == NOT_NOW:
            loop[COUNT] -= 1  # type: ignore[index]
            loop[REFUSED] += 1  # type: ignore[index]
            if loop[REFUSED] > 1 << 40:  # type: ignore[index]
                return NOT_NOW
            continue
        if code != DONE:
            return code
        if scene.ctl[STEPS] % loop[DEEP_EVERY] == 0:  # type: ignore[index]
            code = check_all(mem, scene)
            if code != DONE:
                return code
    return DONE


@compiled
def run_log(mem: Memory, scene: Scene, log: object, loop: object, count: int, deep: bool) -> int:
    """Do the steps of a log again, those that are possible; return DONE or the code of what is found.

    `deep` looks at everything after each step, so that nothing is seen later than it is there.
    `loop[COUNT]` says how many steps have been tried.

    Raises:
        VmBug: an assertion of the allocator failed.
    """
    loop[COUNT] = 0  # type: ignore[index]
    for at in range(0, 4 * count, 4):
        loop[COUNT] += 1  # type: ignore[index]
        code = act(mem, scene, log[at], log[at + 1], log[at + 2], log[at + 3])  # type: ignore[index]
        if code == NOT_NOW:
            continue
        if code == DONE and deep:
            code = check_all(mem, scene)
        if code != DONE:
            return code
    return DONE


WEIGHTS: Final = {
    step_codes.ALLOC: 20,
    step_codes.FREE_BLOCK: 18,
    step_codes.DRAIN: 2,
    step_codes.REPORT_FILL: 5,
    step_codes.REPORT_SEND: 4,
    step_codes.REPORT_ANSWER: 10,
    step_codes.REPORT_DRAIN: 6,
    step_codes.BALLOON_TAKE: 3,
    step_codes.BALLOON_ANSWER: 4,
    step_codes.BALLOON_ACK: 3,
    step_codes.BALLOON_LEAVE: 3,
    step_codes.BALLOON_FREE: 3,
    step_codes.BREAK: 2,
    step_codes.BREAK_HANDLE: 1,
    step_codes.BREAK_MEND: 2,
    step_codes.HIBERNATE: 3,
    step_codes.TRUST: 2,
    step_codes.ISOLATE: 2,
    step_codes.UNISOLATE: 3,
}
"""How often each operation is drawn when all take part; an episode draws its own on top."""
