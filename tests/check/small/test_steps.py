# SPDX-License-Identifier: GPL-2.0-only
"""Elementary steps: what each does, when it is not possible, and what it notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hostzero.check.small import layout, oracle, settle, step_codes
from hostzero.check.small.layout import DONE, NOT_NOW, Scene
from hostzero.check.small.small_guest import Setup, new_guest
from hostzero.check.small.steps import act
from hostzero.mm.mmzone import Memory
from hostzero.mm.page_flags import PG_zeroed

SETUP = Setup(pages=32, cpus=2, capacity=2, owners=4, balloon=2, pcp_high=64)

Guest = tuple[Memory, Scene]


def done(guest: Guest, *taken: Sequence[int]) -> None:
    """Do steps that must be possible and find nothing."""
    for step in taken:
        assert act(*guest, *(*step, 0, 0, 0)[:4]) == DONE, step
        assert oracle.check_all(*guest) == DONE


def marked(guest: Guest) -> list[int]:
    flags = guest[0].mem_map["flags_f"][:32]
    return [pfn for pfn in range(32) if int(flags[pfn]) & PG_zeroed]


REPORT = (
    (step_codes.ALLOC, 2, 0),  # a zone does not give its last block away
    (step_codes.REPORT_FILL, 4, 1),
    (step_codes.REPORT_SEND,),
    (step_codes.REPORT_ANSWER, 0, step_codes.ZEROES),
)


def test_a_report_marks_what_the_device_zeroed() -> None:
    guest = new_guest(SETUP)
    done(guest, *REPORT, (step_codes.REPORT_DRAIN, 1))
    assert marked(guest) == [16]
    assert not guest[0].ram[16 * 512 :].any()


def test_a_failed_report_marks_nothing() -> None:
    guest = new_guest(SETUP)
    done(guest, *REPORT, (step_codes.REPORT_DRAIN, 0))
    assert marked(guest) == []


def test_nobody_is_believed_without_the_bit() -> None:
    guest = new_guest(replace(SETUP, trust=False))
    done(guest, *REPORT, (step_codes.REPORT_DRAIN, 1))
    assert marked(guest) == []
    done(guest, (step_codes.TRUST, 1))
    assert act(*guest, step_codes.TRUST, 1, 0, 0) == NOT_NOW


def test_a_balloon_page_is_marked_and_freed_as_zero() -> None:
    guest = new_guest(SETUP)
    done(
        guest,
        (step_codes.BALLOON_TAKE,),
        (step_codes.BALLOON_TAKE, 0, 0, 1),
        (step_codes.BALLOON_ANSWER, 0, step_codes.ZEROES),
        (step_codes.BALLOON_ANSWER, 1, step_codes.PARTLY),
        (step_codes.BALLOON_ACK,),
    )
    assert len(marked(guest)) == 1
    done(guest, (step_codes.BALLOON_LEAVE,), (step_codes.BALLOON_LEAVE,), (step_codes.BALLOON_FREE,))
    assert len(marked(guest)) == 1
    assert int(guest[0].vm[0].nr_balloon_pages) == 0


@pytest.mark.parametrize("how", range(step_codes.NR_HOWS))
@pytest.mark.parametrize("kind", [0, 4, 5, 15])
@pytest.mark.parametrize("order", [0, 2])
def test_every_way_of_freeing(how: int, kind: int, order: int) -> None:
    guest = new_guest(SETUP)
    done(guest, (step_codes.ALLOC, order, kind, 0))
    shared = how in {step_codes.PUT_AS_ZERO, step_codes.SHARED}
    if shared and order and not kind & step_codes.KIND_COMP:
        assert act(*guest, step_codes.FREE_BLOCK, 0, how, 1) == NOT_NOW
        return
    done(guest, (step_codes.FREE_BLOCK, 0, how, 1))
    cleared = how in {step_codes.AS_ZERO, step_codes.PUT_AS_ZERO, step_codes.NOLOCK_AS_ZERO}
    assert bool(marked(guest)) == cleared


@pytest.mark.parametrize(
    "flags", [{"poisoning": True}, {"init_on_free": True}, {"init_on_alloc": True}, {"debug_vm": False}]
)
def test_every_way_to_boot(flags: dict[str, Any]) -> None:
    guest = new_guest(replace(SETUP, **flags))
    for how in range(step_codes.NR_HOWS):
        done(guest, (step_codes.ALLOC, 2, 7, 0), (step_codes.FREE_BLOCK, 0, how, 0), (step_codes.DRAIN,))
    done(guest, (step_codes.HIBERNATE,))
    assert marked(guest) == []


def test_a_page_breaks_while_it_is_free_and_is_mended() -> None:
    guest = new_guest(SETUP)
    done(guest, *REPORT, (step_codes.REPORT_DRAIN, 1), (step_codes.BREAK, 21), (step_codes.BREAK_HANDLE,))
    assert marked(guest) == []
    assert guest[1].held[21] == step_codes.H_BROKEN
    done(guest, (step_codes.BREAK_MEND, 21), (step_codes.ALLOC, 4, 0))


def test_a_page_breaks_while_it_is_reported() -> None:
    guest = new_guest(SETUP)
    done(guest, *REPORT, (step_codes.BREAK, 21), (step_codes.REPORT_DRAIN, 1), (step_codes.BREAK_HANDLE,))
    assert marked(guest) == []
    assert int(guest[1].rows[layout.R_BROKEN_INSIDE]) == 1


def test_a_page_breaks_in_its_owners_hands() -> None:
    guest = new_guest(SETUP)
    done(guest, (step_codes.ALLOC, 1, 0), (step_codes.BREAK, int(guest[1].own_pfn[0]) or 1))
    done(guest, (step_codes.BREAK_HANDLE,))


def test_what_is_not_possible_changes_nothing() -> None:
    guest = new_guest(SETUP)
    before = [array.copy() for array in guest[1]]
    for op in range(step_codes.NR_OPS):
        if op in {
            step_codes.ALLOC,
            step_codes.DRAIN,
            step_codes.REPORT_FILL,
            step_codes.BALLOON_TAKE,
            step_codes.BREAK,
            step_codes.HIBERNATE,
        }:
            continue
        assert act(*guest, op, 1, 1, 0) == NOT_NOW, step_codes.NAMES[op]
    for name, array, now in zip(Scene._fields, before, guest[1], strict=True):
        assert (array == now).all(), name


def test_an_owner_who_gets_a_dirty_page_as_zero_notices() -> None:
    guest = new_guest(SETUP)
    mem, scene = guest
    mem.mem_map[0].flags_f |= PG_zeroed
    scene.shape[scene.ctl[layout.NOW] * 32] |= layout.MARK_ZEROED  # as if it had been there all along
    assert act(mem, scene, step_codes.ALLOC, 5, step_codes.KIND_ZERO, 0) == layout.NOT_ZERO


def test_a_page_breaks_while_its_block_waits() -> None:
    guest = new_guest(SETUP)
    done(guest, (step_codes.ALLOC, 3, step_codes.KIND_COMP), (step_codes.ALLOC, 1, 0))
    pfn = int(guest[1].own_pfn[0])
    done(guest, (step_codes.FREE_BLOCK, 0, step_codes.NOLOCK_AS_ZERO), (step_codes.BREAK, pfn + 3))
    assert marked(guest) == [pfn]
    done(
        guest,
        (step_codes.FREE_BLOCK, 0, step_codes.DIRTY),
        (step_codes.DRAIN,),
        (step_codes.ALLOC, 4, 0),
        (step_codes.FREE_BLOCK, 0),
    )
    assert marked(guest) == []


def test_a_large_block_that_comes_back_asks_for_a_pass() -> None:
    guest = new_guest(SETUP)
    mem, scene = guest
    done(guest, (step_codes.ALLOC, 3, step_codes.KIND_COMP), (step_codes.DRAIN,))
    mem.vm[0].page_reporting_state = 0
    done(guest, (step_codes.FREE_BLOCK, 0, step_codes.DIRTY), (step_codes.DRAIN,))
    assert mem.vm[0].page_reporting_state == 1
    done(guest, (step_codes.ALLOC, 3, step_codes.KIND_COMP), (step_codes.DRAIN,))
    mem.vm[0].page_reporting_state = 0
    mem.vm[0].page_reporting_order = 6  # the allocator asks for nothing below
    settle.begin(mem, scene)
    scene.ctl[layout.CAME_BACK] = 1
    assert settle.settle(mem, scene) == layout.NOT_ASKED
