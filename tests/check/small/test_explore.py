# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from hostzero.check.small.explore import Exploration, World
from hostzero.errors import VmBug
from hostzero.mm.mmzone import Memory
from tests.check.small import toy
from tests.check.small.test_guest_state import everything

PLENTY = 1 << 30


def exploration(**setup: Any) -> Exploration:
    return Exploration(cast("World", toy), toy.Setup(**setup), toy.expand)


def put(mem: Memory, scene: toy.Scene, kept: dict[str, Any]) -> None:
    # Everything there is, whole arrays at a time.
    for name, value in kept.items():
        (scene.owned if name == "owned" else getattr(mem, name))[:] = value


def all_of(mem: Memory, scene: toy.Scene) -> dict[str, Any]:
    names = ("mem_map", "compound_head", "zone", "pcp", "pageblock", "vm", "cc", "ram")
    return {**{name: np.copy(getattr(mem, name)) for name in names}, "owned": scene.owned.copy()}


def by_hand(setup: toy.Setup, depth: int | None = None) -> list[int]:
    """Return how many states there are up to each depth: slow and obvious."""
    mem, scene = toy.new_guest(setup)
    rows = toy.actions(setup).tolist()
    level = [all_of(mem, scene)]
    seen = {tuple(everything(mem, scene).items())}
    counts = [1]
    while level and (depth is None or len(counts) <= depth):
        following = []
        for state in level:
            for row in rows:
                put(mem, scene, state)
                if toy.act(mem, scene, *row) == 0:
                    key = tuple(everything(mem, scene).items())
                    if key not in seen:
                        seen.add(key)
                        following.append(all_of(mem, scene))
        level = following
        counts.append(len(seen))
    return counts


def test_every_state_is_visited_once() -> None:
    setup = toy.Setup(pages=4, orders=(0,))
    counts = by_hand(setup)
    search = exploration(pages=4, orders=(0,))
    levels = [search.states]
    while not search.closed:
        assert search.advance(PLENTY, PLENTY)
        levels.append(search.states)
        assert search.depth == len(levels) - 1
    assert levels == counts
    assert counts[-1] > 100
    search.check_untouched()


def test_states_are_tried_in_any_portions() -> None:
    whole, parts = exploration(pages=2), exploration(pages=2)
    while not whole.closed:
        whole.advance(PLENTY, PLENTY)
    while not parts.closed:
        parts.advance(3, PLENTY)
    assert (parts.states, parts.transitions, parts.depth) == (whole.states, whole.transitions, whole.depth)


def test_growing_tables_and_new_chunks_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exploration(pages=2)
    while not whole.closed:
        whole.advance(PLENTY, PLENTY)
    parts = exploration(pages=2)
    # Room for a handful of states at a time, as after millions of them.
    parts._chunk_words = 2 * len(parts._now) * len(parts._actions)
    parts._chunks[0].end[1:] = 0
    monkeypatch.setattr(parts, "_ways", parts._ways[:16])
    small = parts._new_chunk()
    for ours, theirs in zip(small, parts._chunks[0], strict=True):
        ours[: len(theirs)] = theirs[: len(ours)]
    parts._chunks[0] = small
    chunks = 1
    while not parts.closed:
        parts.advance(1, PLENTY)
        chunks = max(chunks, len(parts._chunks))
    assert parts.states == whole.states
    assert len(parts._ways) >= whole.states > 16


@pytest.mark.parametrize("wrong", ["wrong_at", "bug_at"])
def test_violation_is_found_by_a_shortest_way(wrong: str) -> None:
    search = exploration(pages=8, orders=(0,), **{wrong: 3})
    while search.found is None:
        assert search.advance(PLENTY, PLENTY)
    assert search.depth == 2  # every sequence of two steps was fine
    assert [step[0] for step in search.found.steps] == ["alloc"] * 3
    said = search.found.violation
    assert said.what == ("so many single pages" + (" have an owner" if wrong == "wrong_at" else ""))
    assert said.kind == ("corruption" if wrong == "wrong_at" else "rot")
    assert said.pfn == (None if wrong == "wrong_at" else 1)
    # The way leads there.
    mem, scene = toy.new_guest(search.setup)
    *others, last = (toy.action_of(step, search.setup) for step in search.found.steps)
    assert all(toy.act(mem, scene, *row) == 0 for row in others)
    if wrong == "wrong_at":
        assert toy.act(mem, scene, *last) == toy.PLANTED
    else:
        with pytest.raises(VmBug):
            toy.act(mem, scene, *last)
    # Nothing is searched after it.
    states = search.states
    search.advance(PLENTY, PLENTY)
    assert search.states == states


def test_violation_that_only_a_whole_look_shows_is_found_in_the_new_state() -> None:
    search = exploration(state_at=1)
    assert search.advance(PLENTY, PLENTY)
    assert search.found is not None
    assert [step[:2] for step in search.found.steps] == [["alloc", 0]]


def test_memory_that_does_not_suffice_ends_the_search() -> None:
    search = exploration(pages=16)
    limit = 1 << 18
    while search.advance(100, limit):
        assert not search.closed
    assert search.nbytes < 2 * limit  # it is looked at when something must grow
    states = search.states
    assert not search.advance(100, limit)
    assert search.states == states
    assert search.advance(100, PLENTY)
    assert search.states > states


def test_array_that_is_no_part_of_the_state_must_not_change() -> None:
    search = exploration()
    search.check_untouched()
    search.mem.memcg[0].usage = 5
    with pytest.raises(AssertionError, match=r"Memory\.memcg has changed"):
        search.check_untouched()
