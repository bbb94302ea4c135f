# SPDX-License-Identifier: GPL-2.0-only
"""Which rows an operation exercises, seen on whole machines."""

from __future__ import annotations

from typing import Any

import pytest

from hostzero.check.lifecycle import ROW_IDS
from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup

FILE: list[list[Any]] = [["resize_pool", 2, 0], ["create_file", 0]]


@pytest.mark.parametrize(
    ("steps", "row"),
    [
        ([["flush", 0]], "drain-set"),
        ([["balloon", 3]], "inflate-ack"),
        ([["balloon", 3], ["balloon", 0]], "deflate"),
        ([["resize_pool", 1, 0]], "hugetlb-not"),
        ([*FILE, ["use_file", 0, 2, 0, 0]], "hugetlb-reserve"),
        ([["flush", 0], ["mmap", 0, 1, 2]], "alloc-zero"),
    ],
)
def test_an_operation_exercises_its_row(steps: list[list[Any]], row: str) -> None:
    load_operations()
    with World(plain_setup(mib=16)) as world:
        for step in steps[:-1]:
            perform(world, step)
        before = world.rows[row]
        perform(world, steps[-1])
        assert world.rows[row] > before
        assert set(world.rows) <= set(ROW_IDS)


def test_to_fill_a_hole_of_a_file_is_not_to_pin_it() -> None:
    load_operations()
    with World(plain_setup(mib=16)) as world:
        for step in (*FILE, ["use_file", 0, 0, 0, 0]):
            perform(world, step)
        assert world.rows["hugetlb-reserve"] == 0
