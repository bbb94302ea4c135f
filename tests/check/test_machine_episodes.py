# SPDX-License-Identifier: GPL-2.0-only
"""Episodes: every part of one is an operation."""

from __future__ import annotations

from typing import Any

import pytest

from hostzero.check.machine_episodes import EPISODES
from hostzero.check.machine_moves import ANY, GROUPS, SAME
from hostzero.check.machine_ops import load_operations
from hostzero.check.machine_repertoire import NEEDS
from hostzero.check.world_setup import CHOICES

OPERATIONS = load_operations()


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
            values = wanted if isinstance(wanted, tuple) else () if wanted in {ANY, SAME} else (wanted,)
            assert all(0 <= value <= largest for value in values)


def test_what_is_the_same_was_said_before() -> None:
    for episode in EPISODES:
        said: set[str] = set()
        for part in (part for part in episode if part[0] in OPERATIONS):
            names = OPERATIONS[part[0]].names
            assert {name for name, wanted in zip(names, part[1:], strict=False) if wanted is SAME} <= said
            said |= set(names)


def test_an_episode_needs_what_a_setup_says() -> None:
    for part in parts():
        if part[0] == "needs":
            assert part[1] in {*CHOICES, *NEEDS}
