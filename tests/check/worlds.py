# SPDX-License-Identifier: GPL-2.0-only
"""Worlds of the search after some steps, and what is found in them when something is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.violation import Violated, Violation
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup

load_operations()


def world(*steps: list[Any], **setup: Any) -> World:
    """Return a world after some steps."""
    made = World(plain_setup(**setup))
    for step in steps:
        perform(made, step)
    return made


def violation_of(made: World, plant: Callable[[World], None]) -> Violation:
    """Plant something between two steps and return what the next one finds."""
    with made:
        plant(made)
        with pytest.raises(Violated) as caught:
            perform(made, ["drain"])
        return caught.value.violation
