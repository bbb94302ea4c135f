# SPDX-License-Identifier: GPL-2.0-only
"""States and laws of the search `machine`: ranges, memory that need not be zero, files, what waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hostzero.check.inventory import FREE, OWNED, PARKED
from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.users import Area
from hostzero.check.violation import Violated
from hostzero.check.world import World
from hostzero.check.world_setup import PART
from hostzero.mm.page_flags import PG_zeroed
from hostzero.units import PAGE_SIZE
from tests.check import worlds

load_operations()


def world(*steps: list[Any], **setup: Any) -> World:
    return worlds.world(*steps, **{"mib": 8, **setup})


def test_what_was_read_as_zero_stays_known() -> None:
    with world(["mmap", 0, 1, 5]) as made:
        area = made.users[0].areas[0]
        assert area.unknown is not None
        assert area.unknown.all()
        perform(made, ["read", 0, 0, 0])
        assert area.unknown.tolist() == [False, True, True]
        perform(made, ["fill", 0, 1, 0, 0])
        assert area.unknown.tolist() == [False, False, True]
        perform(made, ["dontneed", 0, 0, 1])
        assert area.unknown.tolist() == [True, True, True]
        made.close()


def test_a_page_that_was_read_as_zero_and_is_not() -> None:
    with world(["mmap", 0, 1, 5], ["read", 0, 0, 0], ["touch", 0, 0, 0]) as made:
        pfn = int(np.flatnonzero(made.mem.mem_map["mapping"][: made.pages])[0])
        made.bytes_of(pfn, 0)[9] = 1
        with pytest.raises(Violated, match="was given as zero holds something else"):
            perform(made, ["drain"])


def test_where_every_page_is_zeroed_nothing_is_unknown() -> None:
    with world(["mmap", 0, 1, 5], init_on_alloc=True) as made:
        assert made.users[0].areas[0].unknown is None


def test_a_part_of_an_area_knows_as_much() -> None:
    area = Area(4, 8, np.arange(4, dtype=np.uint8), unknown=np.array([True, False, True, False]))
    part = area.part(5, 7)
    part.wrote(6, 7, 9)
    assert part.is_known(np.array([5, 6])).all()
    assert area.content.tolist() == [0, 1, 9, 3]
    area.dropped(4, 6)
    assert not part.is_known(np.array([5]))[0]


def test_the_rest_of_a_file_is_looked_at() -> None:
    with world(["flush", 0], backing=PART) as made:
        made.rest[0][77] ^= 1
        with pytest.raises(Violated, match="not guest memory"):
            perform(made, ["drain"])


def test_each_page_is_full_of_another_byte() -> None:
    with world(["mmap", 0, 2, 0], ["fill", 0, 0, 2, 4]) as made:
        content = made.users[0].areas[0].content
        assert len(set(content.tolist())) == len(content)
        made.close()


def test_a_range_begins_and_ends_anywhere() -> None:
    with world(["flush", 0], ["take_range", 3001, 3, 1, 0], ["take_range", 3600, 0, 0, 0], mib=16) as made:
        assert [count for _, count in made.ranges] == [29, 3]
        assert any(pfn % 4 for pfn, _ in made.ranges)
        perform(made, ["give_range_back", 0, 1])
        assert sorted(count for _, count in made.ranges) == [3, 28]
        made.close()


@pytest.mark.parametrize("inside", [True, False])
def test_what_lies_beside_an_isolated_range_keeps_its_claim(inside: bool) -> None:
    with world(["flush", 0]) as made:
        assert made.before is not None
        pages = made.before.pages
        known = pages.zeroed & (pages.place == FREE) & (pages.head == np.arange(made.pages))
        head = int(np.flatnonzero(known)[-1])
        made.mem.mem_map[head].flags_f &= ~PG_zeroed
        made.isolated = (head, head + 1) if inside else (0, 512)
        if inside:
            made.check()
        else:
            with pytest.raises(Violated, match="is not any more, and nobody had it"):
                made.check()


def test_free_memory_that_nobody_vouches_for_holds_anything() -> None:
    with world(["flush", 1], ["stain", 1]) as made:
        assert made.before is not None
        pages = made.before.pages
        content = made.mm.ram_bytes.reshape(-1, PAGE_SIZE)
        free = pages.place == FREE
        assert (content[free & ~pages.zeroed] == 0xFF).all()
        assert not content[pages.zeroed].any()


def test_what_is_promised_is_not_stained() -> None:
    with world(["stain", 0], init_on_free=True) as made:
        made.close()


def test_blocks_wait_marked_and_unmarked() -> None:
    with world(["park", 1, 0, 3, 0b0101]) as made:
        assert made.before is not None
        pages = made.before.pages
        waiting = pages.place == PARKED
        assert (waiting & pages.zeroed).any()
        assert (waiting & ~pages.zeroed).any()


def test_a_block_that_is_no_folio_is_held_in_part() -> None:
    with world(["kernel_block", 2, 0, 0, 0, 6]) as made:
        assert made.before is not None
        (pfn, order, _) = made.blocks[0]
        assert order == 0
        assert made.before.pages.place[pfn : pfn + 2].tolist()[0] == OWNED
        assert made.before.pages.place[pfn + 1] != OWNED
        made.close()


def test_more_was_zeroed_than_was_handed_out() -> None:
    with world() as made:
        made.mem.vm[0].zeroed_bytes += PAGE_SIZE
        with pytest.raises(Violated, match="more was zeroed than was handed out"):
            perform(made, ["drain"])


def test_a_process_that_has_all_memory_gives_a_page_for_the_table_it_needs() -> None:
    steps: list[list[Any]] = [["mmap", 0, 0, 0], ["mmap", 0, 4, 1], ["crowd", 0, 0, 0], ["thin_out", 1, 0]]
    with world(*steps) as made:
        made.close()


def test_sleep_forgets_nothing() -> None:
    with world(["flush", 0]) as made:
        driver = made.machine.driver
        restore = driver.restore

        def forget() -> None:
            made.mm.forget_zero_claims()
            restore()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "restore", forget)
            with pytest.raises(Violated, match="is not any more, and nobody had it"):
                perform(made, ["suspend"])


@pytest.mark.parametrize("at", [0, 300, 511, 512, 1000])
def test_a_hole_anywhere_in_a_file(at: int) -> None:
    with world(["resize_pool", 2, 0], ["create_file", 1], ["use_file", 0, 0, 0, 1], mib=16) as made:
        perform(made, ["mmap_huge", 0, 1, 2, 0, 0])
        perform(made, ["fill", 0, 0, 5, 4])
        for pages in range(8):
            perform(made, ["punch", 0, at, pages])
        made.close()


def test_a_block_taken_apart_waits_page_by_page() -> None:
    with world(["kernel_block", 3, 0, 0, 0, 0], ["drain"]) as made:
        pfn = made.blocks[0][0]
        perform(made, ["free_apart", 0, 0b1111_0101])
        assert not made.blocks
        assert made.before is not None
        pages = made.before.pages
        assert (pages.place[pfn : pfn + 8] == PARKED).all()
        assert pages.zeroed[pfn : pfn + 8].tolist() == [True, False, True, False, True, True, True, True]
        made.close()


def test_a_folio_is_not_taken_apart() -> None:
    with world(["kernel_block", 3, 0, 2, 0, 0], ["free_apart", 0, 0xFFFF]) as made:
        assert not made.blocks
        made.close()
