# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from hostzero.check.small.guest_state import EVENTS, Picture, arrange, load, save
from hostzero.check.small.layout import DONE, NOT_NOW, NR_OWNED, Scene
from hostzero.check.small.scene_state import normal_form, state_words
from hostzero.check.small.small_guest import Setup, actions, new_guest
from hostzero.check.small.step_codes import FREE_BLOCK
from hostzero.check.small.steps import act
from hostzero.mm.mmzone import VM_DTYPE, Memory

SETUPS = (
    Setup(pages=16, cpus=2, balloon=2, owners=4, capacity=2, pcp_high=4),
    Setup(pages=32, balloon=2, owners=3, capacity=3, max_order=3, debug_vm=False),
    Setup(pages=16, balloon=1, owners=3, capacity=2, poisoning=True, reclaim=False),
)

Guest = tuple[Memory, Scene, Picture]


def guest(setup: Setup) -> Guest:
    mem, scene = new_guest(setup)
    normal_form(mem, scene)
    return arrange(mem, scene, state_words(mem, scene))


def do(mem: Memory, scene: Scene, row: Any) -> int:
    code = int(act(mem, scene, *row))
    if code != NOT_NOW:
        assert code == DONE
        normal_form(mem, scene)
    return code


def walk(mem: Memory, scene: Scene, rows: Any, choose: random.Random, steps: int) -> None:
    done = 0
    while done < steps:
        done += do(mem, scene, choose.choice(rows)) == DONE


def words(picture: Picture) -> list[int]:
    out = np.zeros_like(picture.boot)
    save(picture, out)
    found: list[int] = out.tolist()
    return found


def all_but_events(mem: Memory) -> dict[str, bytes]:
    found = {name: np.asarray(getattr(mem, name)).tobytes() for name in mem._fields if name != "vm"}
    return found | {name: mem.vm[name].tobytes() for name in set(VM_DTYPE.names or ()) - EVENTS}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("seed", range(4))
def test_guest_comes_back_byte_for_byte_and_its_future_is_the_same(setup: Setup, seed: int) -> None:
    choose = random.Random(seed)
    mem, scene, picture = guest(setup)
    rows = actions(setup).tolist()
    walk(mem, scene, rows, choose, 40)
    kept = np.array(words(picture))
    before = all_but_events(mem)
    future = [choose.choice(rows) for _ in range(60)]
    one = [(do(mem, scene, row), words(picture)) for row in future]
    walk(mem, scene, rows, choose, 20)  # what is no state is another now
    load(picture, kept)
    assert all_but_events(mem) == before
    assert words(picture) == kept.tolist()
    assert [(do(mem, scene, row), words(picture)) for row in future] == one
    assert {code for code, _ in one} == {DONE, NOT_NOW}


@pytest.mark.parametrize("setup", SETUPS)
def test_what_is_not_possible_changes_nothing(setup: Setup) -> None:
    choose = random.Random(7)
    mem, scene, picture = guest(setup)
    rows = actions(setup).tolist()
    refused = 0
    for _ in range(3):
        walk(mem, scene, rows, choose, 12)
        kept = np.array(words(picture))
        for row in rows:
            code = do(mem, scene, row)
            if code == NOT_NOW:
                refused += 1
                assert words(picture) == kept.tolist(), row
            load(picture, kept)
    assert refused > 50


def test_owners_are_known_by_their_blocks_and_not_by_number() -> None:
    setup = SETUPS[0]
    mem, scene, picture = guest(setup)
    for row in ([0, 1, 2, 0], [0, 0, 2, 1], [0, 2, 15, 0]):
        assert do(mem, scene, row) == DONE
    count = int(scene.ctl[NR_OWNED])
    blocks = scene.own_pfn[:count].tolist()
    assert blocks == sorted(blocks)
    kept = words(picture)
    # Any other numbering has the same normal form.
    for array in (scene.own_pfn, scene.own_order):
        array[:count] = array[:count][::-1].copy()
    last = int(scene.own_pfn[0])
    normal_form(mem, scene)
    assert words(picture) == kept
    assert do(mem, scene, [FREE_BLOCK, count - 1, 1, 0]) == DONE
    assert last not in scene.own_pfn[: count - 1]


def test_tables_are_cleared_behind_their_ends() -> None:
    mem, scene, picture = guest(SETUPS[0])
    kept = words(picture)
    for name in ("own_pfn", "own_order", "sg_pfn", "sg_order", "answered", "zeroed", "flight", "leaving"):
        getattr(scene, name)[:2] = 7
    assert words(picture) != kept
    normal_form(mem, scene)
    assert words(picture) == kept
