# SPDX-License-Identifier: GPL-2.0-only
"""What an operation may do to what is known: losses that are planted, and what only looks like one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hostzero.check.machine import run_steps
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup
from hostzero.mm.mmap import MADV_POPULATE_WRITE
from hostzero.units import PAGE_SIZE
from tests.check.worlds import violation_of, world

SMALL: dict[str, Any] = {"thp": "never", "backing": "memfd"}
PRIVATE: list[list[Any]] = [
    ["resize_pool", 0, 2],
    ["create_file", 0],
    ["mmap_huge", 0, 0, 2, 0, 0],
    ["fill", 0, 0, 0, 0],
    ["mmap_huge", 0, 0, 1, 0, 0],
]
"""A file with something in it, and a private mapping of it that comes second."""


def populate(made: World, mapping: int) -> None:
    """Fault all of a mapping in, behind the back of the operations."""
    user = made.users[0]
    area = user.areas[mapping]
    length = (area.end - area.start) * PAGE_SIZE
    user.process.madvise(area.start * PAGE_SIZE, length, MADV_POPULATE_WRITE)


def test_a_known_page_that_the_host_has_to_back_again_is_a_loss() -> None:
    def plant(made: World) -> None:
        assert made.before is not None
        before = made.before
        made.untouched = True
        populate(made, 0)
        mine = np.flatnonzero(made.mem.mem_map["mapping"][: made.pages])
        known = mine[before.pages.zeroed[mine] & ~before.backed[mine]]
        assert len(known)
        made.bytes_of(int(known[0]), 0)[:] = 0

    found = violation_of(world(["flush", 0], ["mmap", 0, 4, 0], **SMALL), plant)
    assert (found.kind, found.what) == ("lost", "the host had to back a page that was known to be zero")


def drop_a_hint(made: World) -> None:
    """Fault a mapping in as if one page of it had been asked for as memory of any content."""
    made.untouched = True
    populate(made, 0)
    made.mem.vm[0].known_zero_bytes -= PAGE_SIZE
    made.mem.vm[0].dropped_hint_bytes += PAGE_SIZE


def test_a_hint_that_a_fault_does_not_use_is_a_loss() -> None:
    found = violation_of(world(["flush", 0], ["mmap", 0, 4, 0], thp="never"), drop_a_hint)
    what = "a page that was known to be zero was asked for as if that did not matter"
    assert (found.kind, found.what) == ("lost", what)


def test_a_mapping_that_need_not_be_zero_drops_hints() -> None:
    with world(["flush", 0], ["mmap", 0, 4, 5], ["populate", 0, 0, 4], thp="never") as made:
        assert made.mem.vm[0].dropped_hint_bytes


@pytest.mark.parametrize("elsewhere", ["icache_aliasing", "dcache_aliasing"])
def test_where_the_fault_zeroes_anyhow_a_hint_is_of_no_use(elsewhere: str) -> None:
    with world(["flush", 0], ["mmap", 0, 4, 0], thp="never", **{elsewhere: True}) as made:
        drop_a_hint(made)
        made.check("plant")


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_copy_that_was_zeroed_first_is_a_loss(zeroed: bool) -> None:
    def plant(made: World) -> None:
        made.touches = True
        populate(made, 1)
        made.mem.vm[0].zeroed_bytes += PAGE_SIZE * 512

    if zeroed:
        found = violation_of(world(*PRIVATE, mib=16), plant)
        assert (found.kind, found.what) == ("lost", "a page that is overwritten at once was zeroed first")
    else:
        assert run_steps(plain_setup(mib=16), [*PRIVATE, ["touch", 1, 0, 0]], close=True)[0] is None


def test_the_copy_of_a_page_that_was_known_to_be_zero_is_no_loss() -> None:
    steps = [["flush", 0], *PRIVATE, ["populate", 1, 0, 0]]
    assert run_steps(plain_setup(mib=16), steps, close=True)[0] is None


def test_a_target_of_migration_asks_for_no_zeros() -> None:
    def plant(made: World) -> None:
        made.unasked = True
        made.mem.vm[0].zeroed_bytes += PAGE_SIZE * 512

    steps: list[list[Any]] = [["take_huge_target", 0]]
    assert run_steps(plain_setup(), steps, close=True)[0] is None
    assert violation_of(world(*steps), plant).what == "memory was zeroed, and nobody had asked for zeros"
