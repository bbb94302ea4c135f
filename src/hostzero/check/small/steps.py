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

from hostzero.check.small.balloon_steps import (
    balloon_ack,
    balloon_answer,
    balloon_free,
    balloon_leave,
    balloon_take,
)
from hostzero.check.small.failure_steps import (
    break_handle,
    break_mend,
    break_page,
    hibernate_step,
    isolate_step,
    trust_step,
)
from hostzero.check.small.layout import NOT_NOW, Scene
from hostzero.check.small.owner_steps import alloc_step, free_step
from hostzero.check.small.report_steps import report_answer, report_drain, report_fill, report_send
from hostzero.check.small.settle import begin, settle
from hostzero.check.small.step_codes import (
    ALLOC,
    BALLOON_ACK,
    BALLOON_ANSWER,
    BALLOON_FREE,
    BALLOON_LEAVE,
    BALLOON_TAKE,
    BREAK,
    BREAK_HANDLE,
    BREAK_MEND,
    DRAIN,
    FREE_BLOCK,
    HIBERNATE,
    ISOLATE,
    REPORT_ANSWER,
    REPORT_DRAIN,
    REPORT_FILL,
    REPORT_SEND,
    TRUST,
    UNISOLATE,
)
from hostzero.jit import far
from hostzero.mm.mmzone import NR_PAGE_ORDERS, Memory
from hostzero.mm.pcplist import drain_all_pages


@far
def act(mem: Memory, scene: Scene, op: int, a: int, b: int, c: int) -> int:
    """Do one step and check what it did.

    Returns DONE; NOT_NOW if it cannot be done in this state, which then is as it was; or the
    code of what was found (`small_guest.violation` describes it).

    Raises:
        VmBug: an assertion of the allocator failed.
    """
    if op == ALLOC:
        return alloc_step(mem, scene, a, b, c)
    if op == FREE_BLOCK:
        return free_step(mem, scene, a, b, c)
    if op == DRAIN:
        begin(mem, scene)
        drain_all_pages(mem)
        return settle(mem, scene)
    if op == REPORT_FILL:
        return report_fill(mem, scene, a, b)
    if op == REPORT_SEND:
        return report_send(scene)
    if op == REPORT_ANSWER:
        return report_answer(mem, scene, a, b)
    if op == REPORT_DRAIN:
        return report_drain(mem, scene, a)
    if op == BALLOON_TAKE:
        return balloon_take(mem, scene, c)
    if op == BALLOON_ANSWER:
        return balloon_answer(mem, scene, a, b)
    if op == BALLOON_ACK:
        return balloon_ack(mem, scene)
    if op == BALLOON_LEAVE:
        return balloon_leave(mem, scene)
    if op == BALLOON_FREE:
        return balloon_free(mem, scene, c)
    if op == BREAK:
        return break_page(mem, scene, a)
    if op == BREAK_HANDLE:
        return break_handle(mem, scene)
    if op == BREAK_MEND:
        return break_mend(mem, scene, a)
    if op == HIBERNATE:
        return hibernate_step(mem, scene)
    if op == TRUST:
        return trust_step(mem, scene, a)
    if op == ISOLATE:
        return isolate_step(mem, scene, a, True)
    if op == UNISOLATE:
        return isolate_step(mem, scene, a, False)
    return NOT_NOW


NR_REL: Final = 1 << NR_PAGE_ORDERS
"""Blocks that one step can put back: each page of the largest one may come back on its own."""
