# SPDX-License-Identifier: GPL-2.0-only
"""The oracle's law, one clause after the other: each test breaks it by hand and sees it notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.check.small import layout, list_walk, oracle
from hostzero.check.small.layout import DONE, Scene
from hostzero.check.small.small_guest import Setup, new_guest
from hostzero.check.small.step_codes import (
    ALLOC,
    AS_ZERO,
    CLEAN,
    DIRTY,
    DRAIN,
    FREE_BLOCK,
    H_OWNER,
    KIND_COMP,
)
from hostzero.check.small.steps import act
from hostzero.mm.list import list_add, list_del, list_first
from hostzero.mm.mmzone import Memory, free_list
from hostzero.mm.page_flags import PG_dirty, PG_reported, PG_zeroed

Guest = tuple[Memory, Scene]


@pytest.fixture
def guest() -> Guest:
    """Sixteen free pages in one block."""
    return new_guest(Setup(pages=16, pcp_high=64))


def settle(guest: Guest) -> int:
    """Walk and hold the changes against the law, as after a step that put nothing back."""
    mem, scene = guest
    code = int(list_walk.walk(mem, scene))
    return code if code != DONE else int(oracle.check_changed(mem, scene))


def first(guest: Guest, order: int) -> int:
    mem, _ = guest
    return int(list_first(mem, free_list(mem, 0, order, 1)))


def test_nothing_done_nothing_found(guest: Guest) -> None:
    assert settle(guest) == DONE
    assert guest[1].ctl[layout.NR_CHANGED] == 0
    assert oracle.check_all(*guest) == DONE


def damage(name: str) -> Callable[[Guest], None]:
    def apply(guest: Guest) -> None:
        mem, scene = guest
        pfn = first(guest, 4)
        if name == "invented":
            mem.ram[:] = 0
            mem.mem_map[pfn].flags_f |= PG_zeroed
        elif name == "false":
            mem.mem_map[pfn].flags_f |= PG_zeroed
        elif name == "told":
            mem.mem_map[pfn].flags_f |= PG_reported
        elif name == "flags":
            mem.mem_map[pfn].flags_f |= PG_dirty
            scene.shape[:] = 0  # as if the block had just come
            scene.source[:] = 1
        elif name == "count":
            mem.zone[0].nr_free_pages += 1
        elif name == "owned":
            scene.held[pfn + 3] = H_OWNER
            scene.shape[:] = 0
            scene.source[:] = 1
        elif name == "nobody's":
            scene.shape[:] = 0
        elif name == "links":
            mem.mem_map[pfn].lru_prev = 3
        elif name == "order":
            mem.mem_map[pfn].private = 2
        elif name == "list":
            list_del(mem, pfn)
            list_add(mem, pfn, int(free_list(mem, 0, 4, 0)))

    return apply


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("invented", layout.INVENTED),
        ("false", layout.FALSE_ZERO),
        ("told", layout.FALSELY_TOLD),
        ("flags", layout.DIRTY_RECORD),
        ("count", layout.BAD_COUNT),
        ("owned", layout.OWNED),
        ("nobody's", layout.NOBODYS),
        ("links", layout.BAD_LINKS),
        ("order", layout.BAD_BLOCK),
        ("list", layout.WRONG_TYPE),
    ],
)
def test_damage_is_noticed_and_named(guest: Guest, name: str, code: int) -> None:
    damage(name)(guest)
    assert settle(guest) == code
    assert int(guest[1].problem[layout.CODE]) == code


def zeroed_halves(guest: Guest) -> None:
    """Leave pages 0 to 7 free and known zero, 8 to 15 owned."""
    for _ in range(2):
        assert act(*guest, ALLOC, 3, KIND_COMP, 0) == DONE
    low = 0 if int(guest[1].own_pfn[0]) == 0 else 1
    assert act(*guest, FREE_BLOCK, low, AS_ZERO, 0) == DONE
    assert act(*guest, DRAIN, 0, 0, 0) == DONE


def test_a_forgotten_mark_is_lost(guest: Guest) -> None:
    zeroed_halves(guest)
    mem, _ = guest
    mem.mem_map[first(guest, 3)].flags_f &= ~PG_zeroed
    assert settle(guest) == layout.FORGOTTEN


def test_a_mark_may_be_lost_in_a_step_of_several_parts(guest: Guest) -> None:
    zeroed_halves(guest)
    mem, scene = guest
    mem.mem_map[first(guest, 3)].flags_f &= ~PG_zeroed
    scene.ctl[layout.LOSSY] = 1
    assert settle(guest) == DONE


def test_a_block_of_a_zero_and_another_half_is_not_zero(guest: Guest) -> None:
    zeroed_halves(guest)
    mem, scene = guest
    assert act(mem, scene, FREE_BLOCK, 0, DIRTY, 0) == DONE
    assert int(scene.rows[layout.R_MERGE_ONE]) == 0  # parked
    assert act(mem, scene, DRAIN, 0, 0, 0) == DONE
    assert int(scene.rows[layout.R_MERGE_ONE]) == 1
    mem.ram[:] = 0
    mem.mem_map[first(guest, 4)].flags_f |= PG_zeroed
    assert settle(guest) == layout.INVENTED


def test_a_block_of_two_zero_halves_is_zero(guest: Guest) -> None:
    zeroed_halves(guest)
    mem, scene = guest
    assert act(mem, scene, FREE_BLOCK, 0, AS_ZERO, 0) == DONE
    assert act(mem, scene, DRAIN, 0, 0, 0) == DONE
    assert int(scene.rows[layout.R_MERGE_BOTH]) == 1
    assert int(mem.mem_map[first(guest, 4)].flags_f) & PG_zeroed


def test_a_page_that_nobody_has_is_missing(guest: Guest) -> None:
    mem, scene = guest
    assert act(mem, scene, ALLOC, 0, 0, 0) == DONE
    assert oracle.check_all(mem, scene) == DONE
    scene.held[int(scene.own_pfn[0])] = 0
    assert oracle.check_all(mem, scene) == layout.MISSING


def test_bytes_under_an_old_claim_are_looked_at_too(guest: Guest) -> None:
    zeroed_halves(guest)
    mem, scene = guest
    mem.ram[first(guest, 3) * 512 + 511] = 1
    assert settle(guest) == DONE  # nothing changed on the lists
    assert oracle.check_all(mem, scene) == layout.FALSE_ZERO
    assert int(scene.problem[layout.WORD]) % 512 == 511


def test_unmerged_buddies_are_noticed(guest: Guest) -> None:
    mem, scene = guest
    assert act(mem, scene, ALLOC, 3, KIND_COMP, 0) == DONE
    assert act(mem, scene, FREE_BLOCK, 0, CLEAN, 0) == DONE
    assert act(mem, scene, DRAIN, 0, 0, 0) == DONE
    pfn = first(guest, 4)
    list_del(mem, pfn)
    for half in (pfn, pfn + 8):
        mem.mem_map[half].page_type = mem.mem_map[pfn].page_type
        mem.mem_map[half].private = 3
        list_add(mem, half, int(free_list(mem, 0, 3, 1)))
    mem.zone[0].nr_free[4] = 0
    mem.zone[0].nr_free[3] = 2
    assert settle(guest) == DONE
    assert oracle.check_all(mem, scene) == layout.UNMERGED
