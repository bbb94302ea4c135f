# SPDX-License-Identifier: GPL-2.0-only
"""What a guest does: what it cannot live it does not draw, and a number is the same steps each time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hostzero.check.machine_episodes import COMMON, EPISODES
from hostzero.check.machine_moves import ANY, SAME
from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.machine_repertoire import (
    EVERYTHING,
    FEW,
    OFTEN,
    PLACES,
    Repertoire,
    episodes_of,
    has,
    repertoire,
    steps_of,
)
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup

OPERATIONS = load_operations()
UNCHECKED = {"debug_vm": False, "init_on_alloc": False, "init_on_free": False, "page_poisoning": False}


@pytest.mark.parametrize(
    ("need", "having", "lacking"),
    [
        ("cma", {"cma": True}, {}),
        ("unchecked", UNCHECKED, {}),
        ("believed_balloon", {}, {"features": 2}),  # no bit 7
        ("believed_balloon", {}, {"page_poisoning": True}),
        ("believed_balloon", {}, {"confidential": True}),
        ("little_memory", {}, {"mib": 16}),
        ("reports_to_another", {"features": 3}, {}),
    ],
)
def test_what_a_guest_cannot_live_is_not_drawn(
    need: str, having: dict[str, Any], lacking: dict[str, Any]
) -> None:
    having, without = plain_setup(**having), plain_setup(**lacking)
    assert not has(without, need)
    assert has(having, need)
    special = [episode[1:] for episode in EPISODES if episode[0] == ("needs", need)]
    assert special
    for episode in special:
        assert episodes_of(having).count(episode) == OFTEN
        assert episode not in episodes_of(without)


def test_a_number_is_the_same_steps_each_time() -> None:
    def played(move: int) -> list[list[Any]]:
        steps = []
        does = repertoire(plain_setup(), OPERATIONS, 0)
        with World(plain_setup()) as world:
            for step in steps_of(world, OPERATIONS, does, move):
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
            does = repertoire(setup, OPERATIONS, 0)
            return [step[0] for step in steps_of(world, OPERATIONS, does, 5, first=first)]

    assert "take_from_cma" in names(plain_setup(cma=True, mib=16, features=5), 3)
    # Without anything of its own it begins with one episode after the other.
    nothing = plain_setup(features=5, mib=16)
    assert episodes_of(nothing) == list(COMMON)
    assert len({tuple(names(nothing, first)) for first in range(6)}) > 3


def test_most_guests_keep_to_a_few_episodes() -> None:
    setup = plain_setup()
    everything = repertoire(setup, OPERATIONS, 0)
    assert everything.episodes == episodes_of(setup)
    assert set(everything.names) == set(OPERATIONS)
    few = [repertoire(setup, OPERATIONS, theme) for theme in range(1, EVERYTHING)]
    assert all(len(does.episodes) == FEW for does in few)
    assert all(set(does.names) < set(OPERATIONS) for does in few)
    assert all("flush" in does.names for does in few)
    assert len({str(does.episodes) for does in few}) > 1
    assert few[0] == repertoire(setup, OPERATIONS, 1)


def test_the_next_thing_is_often_done_at_the_same_place() -> None:
    does = repertoire(plain_setup(), OPERATIONS, 0)
    with World(plain_setup()) as world:
        perform(world, ["mmap", 0, 4, 1])
        steps = [step for move in range(80) for step in steps_of(world, OPERATIONS, does, move)]
    places = [step[2] for step in steps if step[0] in {"touch", "read", "populate"}]
    assert {"which", "at", "length"} <= PLACES
    again = sum(now == before for before, now in itertools.pairwise(places))
    assert again > len(places) // 5


def test_what_shall_be_the_same_is_what_was_said_last() -> None:
    episode = (
        ("exhaust", (2, 3), 1, 0, 0),
        ("thin_out", ANY, ANY),
        ("kernel_block", SAME, SAME, ANY, SAME, 5),
    )
    does = Repertoire([episode], [], {})
    with World(plain_setup()) as world:
        seen = [list(steps_of(world, OPERATIONS, does, move, first=None)) for move in range(8)]
    drawn = [steps for steps in seen if steps]
    assert {steps[0][1] for steps in drawn} == {2, 3}
    assert all(steps[-1][1:3] == steps[0][1:3] and steps[-1][4] == 0 for steps in drawn)
