# SPDX-License-Identifier: GPL-2.0-only
"""Small guests: setups and steps to and from JSON, and what is said in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hostzero.check.small import layout, list_walk, oracle, step_codes, steps
from hostzero.check.small.small_guest import (
    WHAT,
    Setup,
    action_of,
    actions,
    new_guest,
    place_name,
    state_of,
    step_of,
    violation,
)
from hostzero.errors import UsageError

SMALL = Setup(pages=16, cpus=2, owners=2, balloon=2, capacity=2, max_order=2)


def test_a_setup_survives_json() -> None:
    setup = replace(SMALL, kinds=(0, 3), actors=("alloc", "free"))
    assert Setup.from_json(setup.to_json()) == setup


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pages", 8),
        ("pages", "16"),
        ("cpus", 0),
        ("capacity", 33),
        ("reporting_order", 11),
        ("actors", ["dance"]),
        ("pagse", 16),
    ],
)
def test_a_setup_that_cannot_be_made_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field if field != "actors" else "dance"):
        Setup.from_json(SMALL.to_json() | {field: value})


def test_every_action_survives_json() -> None:
    rows = actions(SMALL).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)
    assert {row[0] for row in rows} == set(range(step_codes.NR_OPS)) - {
        step_codes.ISOLATE,
        step_codes.UNISOLATE,
    }
    for row in rows:
        assert action_of(step_of(*row), SMALL) == tuple(row)


@pytest.mark.parametrize(
    "step", [["dance"], ["alloc"], ["alloc", 1, 2, 9], ["break", -1], ["drain", 1], ["alloc", 11, 0, 0]]
)
def test_a_step_that_there_is_not_is_refused(step: list[object]) -> None:
    with pytest.raises(UsageError):
        action_of(step, SMALL)


def test_every_code_has_words() -> None:
    codes = {
        value
        for name, value in vars(layout).items()
        if name.isupper()
        and isinstance(value, int)
        and 100 <= value < 200
        and not name.startswith(("MARK", "R_"))
    }
    assert codes == set(WHAT)


def test_a_violation_says_which_byte() -> None:
    mem, scene = new_guest(SMALL)
    mem.mem_map[0].flags_f |= 1 << 14
    assert list_walk.walk(mem, scene) == layout.DONE
    code = int(oracle.check_changed(mem, scene))
    found = violation(mem, scene, code)
    assert (found.kind, found.pfn, found.order) == ("corruption", 0, 4)
    assert found.where == "free list of order 4, Movable"
    assert found.wrong_value == 0x5A
    assert found.wrong_offset == 0


def test_the_state_of_a_page_in_words() -> None:
    mem, scene = new_guest(SMALL)
    assert state_of(mem, scene, 5) == "free list of order 4, Movable, in the block 0x0, order 4, no mark"
    assert steps.act(mem, scene, step_codes.ALLOC, 0, 0, 0) == layout.DONE
    assert state_of(mem, scene, int(scene.own_pfn[0])) == "owned"
    assert steps.act(mem, scene, step_codes.FREE_BLOCK, 0, step_codes.AS_ZERO, 1) == layout.DONE
    assert "CPU 1's list" in state_of(mem, scene, int(scene.own_pfn[0]))
    assert "known zero" in state_of(mem, scene, int(scene.own_pfn[0]))


def test_lists_have_names() -> None:
    mem, _ = new_guest(SMALL)
    assert place_name(mem, int(mem.vm[0].balloon_head)) == "the balloon"
    assert place_name(mem, int(mem.vm[0].trylock_heads)) == "the list of deferred frees"
    assert place_name(mem, 3) == ""
