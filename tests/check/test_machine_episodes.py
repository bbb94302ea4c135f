# SPDX-License-Identifier: GPL-2.0-only
"""Episodes: every part of one is an operation, and what a guest cannot live it does not draw."""

from __future__ import annotations

from typing import Any

import pytest

from hostzero.check.machine_episodes import ANY, EPISODES, GROUPS, OFTEN, episodes_of, has, steps_of
from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.world import World
from hostzero.check.world_setup import CHOICES, plain_setup

OPERATIONS = load_operations()
UNCHECKED = {"debug_vm": False, "init_on_alloc": False, "init_on_free": False, "page_poisoning": False}


def parts() -> list[tuple[Any, ...]]:
    """Return every part of every episode, and of what a group stands for."""
    everything = [part for episode in EPISODES for part in episode]
    return [*everything, *(part for group in GROUPS.values() for part in group)]


@pytest.mark.parametrize("part", [part for part in parts() if part[0] != "needs" and part[0] not in GROUPS])
def test_a_part_is_an_operation_with_values_that_it_takes(part: tuple[Any, ...]) -> None:
    for name in part[0] if isinstance(part[0], tuple) else (part[0],):
        most = OPERATIONS[name].most
        assert len(part) - 1 in {0, len(most)}
        for wanted, largest in zip(part[1:], most, strict=False):
            values = wanted if isinstance(wanted, tuple) else () if wanted is ANY else (wanted,)
            assert all(0 <= value <= largest for value in values)


def test_an_episode_needs_what_a_setup_says() -> None:
    for part in parts():
        if part[0] == "needs":
            assert part[1] in {*CHOICES, "unchecked"}


@pytest.mark.parametrize(("need", "other"), [("cma", {"cma": True}), ("unchecked", UNCHECKED)])
def test_what_a_guest_cannot_live_is_not_drawn(need: str, other: dict[str, Any]) -> None:
    without, having = plain_setup(), plain_setup(**other)
    assert not has(without, need)
    assert has(having, need)
    special = sum(episode[0] == ("needs", need) for episode in EPISODES)
    assert special
    assert len(episodes_of(having)) - len(episodes_of(without)) == special * OFTEN


def test_a_number_is_the_same_steps_each_time() -> None:
    def played(move: int) -> list[list[Any]]:
        steps = []
        with World(plain_setup()) as world:
            for step in steps_of(world, OPERATIONS, move):
                steps.append(step)
                perform(world, step)
        return steps

    seen = [played(move) for move in range(12)]
    assert seen == [played(move) for move in range(12)]
    assert any(len(steps) > 2 for steps in seen)
    assert all(isinstance(argument, int) for steps in seen for step in steps for argument in step[1:])


def test_a_guest_begins_with_what_it_alone_can_do() -> None:
    def names(setup: dict[str, Any], first: int) -> list[str]:
        with World(setup) as world:
            return [step[0] for step in steps_of(world, OPERATIONS, 5, first=first)]

    assert "take_from_cma" in names(plain_setup(cma=True, mib=8), 3)
    # Without anything of its own it begins with one episode after the other.
    assert len({tuple(names(plain_setup(), first)) for first in range(6)}) > 3
