# SPDX-License-Identifier: GPL-2.0-only
"""The world of the search: each thing that it looks at is planted, and found for what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hostzero.check.host import HALF, LEAVE_RUBBISH, SAY_LESS, SAY_NOTHING
from hostzero.check.inventory import BALLOON, FREE, OWNED, take_inventory
from hostzero.check.machine_ops import load_operations, perform
from hostzero.check.oracle import READ_AGAIN
from hostzero.check.violation import Violated
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup
from hostzero.errors import OutOfMemory
from hostzero.mm.mmzone import MAX_PAGE_ORDER
from hostzero.mm.page_flags import PG_reported, PG_zeroed
from hostzero.mm.page_isolation import (
    PB_ISOLATE_MODE_OTHER,
    start_isolate_page_range,
    undo_isolate_page_range,
)
from tests.check.worlds import violation_of, world

OPERATIONS = load_operations()


def a_free_page(made: World, *, zeroed: bool) -> int:
    assert made.before is not None
    pages = made.before.pages
    return int(np.flatnonzero((pages.place == FREE) & (pages.zeroed == zeroed))[-1])


def head_of(made: World, pfn: int) -> int:
    assert made.before is not None
    return int(made.before.pages.head[pfn])


def test_a_mark_on_a_dirty_block() -> None:
    def plant(made: World) -> None:
        head = head_of(made, a_free_page(made, zeroed=False))
        made.mem.mem_map[head].flags_f |= PG_zeroed

    found = violation_of(world(), plant)
    assert (found.kind, found.wrong_offset, found.wrong_value) == ("corruption", 0, 0x5A)
    assert "is claimed to be zero and is not" in found.what
    assert found.where.startswith("the free list of order")


def test_a_mark_without_a_reason_on_a_block_that_happens_to_be_zero() -> None:
    def plant(made: World) -> None:
        head = head_of(made, a_free_page(made, zeroed=False))
        assert made.before is not None
        made.bytes_of(head, int(made.before.pages.order[head]))[:] = 0
        made.mem.mem_map[head].flags_f |= PG_zeroed

    assert (
        violation_of(world(), plant).what == "a page is claimed to be zero that nobody has shown to be zero"
    )


def test_a_write_to_a_block_that_is_known_to_be_zero() -> None:
    def plant(made: World) -> None:
        made.bytes_of(a_free_page(made, zeroed=True), 0)[100] = 7

    found = violation_of(world(["flush", 0]), plant)
    assert found.kind == "corruption"
    assert found.wrong_offset is not None
    assert found.wrong_offset % 4096 == 100
    assert found.wrong_value == 7
    assert any(event.startswith("flush 0: a free list") for event in found.history)


def test_a_mark_that_is_taken_off_is_a_loss() -> None:
    def plant(made: World) -> None:
        made.mem.mem_map[head_of(made, a_free_page(made, zeroed=True))].flags_f &= ~PG_zeroed

    assert violation_of(world(["flush", 0]), plant).kind == "lost"


def test_news_that_is_forgotten_is_a_loss() -> None:
    def plant(made: World) -> None:
        made.mem.mem_map[head_of(made, a_free_page(made, zeroed=True))].flags_f &= ~PG_reported

    found = violation_of(world(["flush", 0]), plant)
    assert found.what == "a part of a reported block is not reported any more"


@pytest.mark.parametrize("gigantic", [False, True])
def test_a_block_that_isolation_took_apart_and_merged_is_no_loss(gigantic: bool) -> None:
    made = world(["flush", 0], gigantic=gigantic, mib=32)
    assert made.before is not None
    pages = made.before.pages
    whole = (pages.place == FREE) & (pages.order == MAX_PAGE_ORDER) & pages.reported & pages.zeroed
    head = int(np.flatnonzero(whole & (pages.head == np.arange(len(pages.head))))[0])

    def plant(made: World) -> None:
        end = head + (1 << MAX_PAGE_ORDER)
        assert start_isolate_page_range(made.mem, head, end, PB_ISOLATE_MODE_OTHER)
        undo_isolate_page_range(made.mem, head, end)
        assert not made.mem.mem_map[head].flags_f & PG_reported

    if gigantic:
        with made:
            plant(made)
            perform(made, ["drain"])
    else:
        # Nobody isolates pageblocks there without saying so.
        assert violation_of(made, plant).kind == "lost"


def test_a_block_is_told_once() -> None:
    with world(["flush", 0]) as made:
        head = head_of(made, a_free_page(made, zeroed=True))
        made.mem.mem_map[head].flags_f &= ~PG_reported
        with pytest.raises(Violated, match="was reported again"):
            perform(made, ["flush", 0])


def test_news_that_was_never_told() -> None:
    def plant(made: World) -> None:
        made.mem.mem_map[head_of(made, a_free_page(made, zeroed=False))].flags_f |= PG_reported

    found = violation_of(world(), plant)
    assert (found.kind, "the host was not told" in found.what) == ("rot", True)


def test_a_byte_of_a_process() -> None:
    def plant(made: World) -> None:
        pfn = int(np.flatnonzero(made.mem.mem_map["mapping"][: made.pages])[0])
        made.bytes_of(pfn, 0)[5] ^= 1

    found = violation_of(world(["mmap", 0, 2, 1]), plant)
    assert found.what == "an owner's page does not hold what was written to it"
    assert (found.wrong_offset, found.wrong_value) == (5, 0x10)


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (lambda made: made.mem.mem_map[made.pages - 1].__setattr__("lru_prev", 3), "links do not match"),
        (lambda made: made.mem.zone[0].__setattr__("nr_free_pages", 3), "nr_free_pages"),
        (lambda made: made.mem.vm[0].__setattr__("nr_balloon_pages", 3), "the balloon's count"),
        (lambda made: made.mem.mem_map[0].__setattr__("flags_f", PG_zeroed), "has reached an owner"),
        (lambda made: made.mem.pcp[0].__setattr__("count", 9), "a per-CPU count"),
    ],
    ids=["links", "free", "balloon", "mark", "parked"],
)
def test_what_rots(plant: Callable[[World], None], what: str) -> None:
    with World(plain_setup()) as made:
        head = int(np.flatnonzero(made.mem.mem_map["lru_prev"][: made.pages] >= 0)[0])
        if "links" in what:
            made.mem.mem_map[head].lru_prev = 3
        else:
            plant(made)
        with pytest.raises(Violated, match=what) as caught:
            take_inventory(made.mem)
        assert caught.value.violation.kind == "rot"


def test_a_host_that_fails_shows_nothing() -> None:
    with world(["host_fails", HALF, HALF, HALF], ["flush", 0]) as made:
        assert made.host.told.any()
        assert made.before is not None
        assert np.count_nonzero(made.before.pages.zeroed) == np.count_nonzero(made.host.zero)


@pytest.mark.parametrize("lie", [SAY_NOTHING, SAY_LESS, LEAVE_RUBBISH])
def test_a_host_that_leaves_out_what_it_could_say(lie: int) -> None:
    with world(["host_lies", lie, lie, lie], ["balloon", 2]) as made:
        assert made.before is not None
        inside = made.before.pages.place == BALLOON
        assert inside.any()
        known = np.count_nonzero(made.before.pages.zeroed & inside)
        assert known == (8 if lie == SAY_LESS else 0)


def test_a_confidential_guest_is_shown_nothing() -> None:
    with world(["flush", 0], ["balloon", 2], confidential=True) as made:
        assert made.host.told.any()
        assert not made.host.zero.any()
        assert made.before is not None
        assert not made.before.pages.zeroed.any()


def test_everything_can_be_given_back() -> None:
    steps: list[list[Any]] = [
        ["flush", 0],
        ["mmap", 0, 4, 1],
        ["kernel_block", 3, 0, 1, 0, 0],
        ["take_run", 4, 1, 0, 0, 0],
    ]
    with world(*steps, ["balloon", 3], ["break_page", 700, 0], ["hibernate"]) as made:
        made.close()
        assert made.before is not None
        assert made.before.pages.place[0] == OWNED


def test_everybody_can_give_everything_back_and_go_on() -> None:
    with world(["flush", 0], ["mmap", 0, 4, 1], ["kernel_block", 3, 0, 0, 0, 0], ["balloon", 3]) as made:
        held = made.mm.vm_stats().free_pages
        perform(made, ["settle"])
        assert not made.blocks
        assert made.mm.balloon.count == 0
        assert not any(user.areas for user in made.users)
        assert made.mm.vm_stats().free_pages > held
        perform(made, ["mmap", 0, 4, 2])
        assert made.users[0].areas


def test_a_crowd_leaves_few_pages_and_the_kernel_can_take_the_last_blocks() -> None:
    with world(["crowd", 0, 3, 1]) as made:
        assert made.mm.vm_stats().free_pages < 400
        perform(made, ["thin_out", 0, 0])
        perform(made, ["exhaust", 3, 0, 1, 0])
        taken = len(made.blocks)
        assert taken
        perform(made, ["exhaust", 3, 0, 1, 0])
        assert len(made.blocks) == taken  # there was none left


def test_others_give_back_what_a_table_needs_one_after_the_other() -> None:
    """The runs and the balloon first, then the kernel's blocks, then the other process."""
    with world(["mmap", 0, 2, 1], ["mmap", 1, 2, 1], ["kernel_block", 3, 0, 0, 0, 0]) as made:
        left: list[tuple[bool, bool]] = []

        def short() -> None:
            left.append((bool(made.blocks), bool(made.users[1].areas)))
            if len(left) < 4:
                raise OutOfMemory("short")

        made.with_room(short, made.users[0])
        assert left == [(True, True), (True, True), (False, True), (False, False)]
        assert made.users[0].areas  # whoever asks keeps what it has
        made.check()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_can_be_the_first(name: str) -> None:
    operation = OPERATIONS[name]
    with World(plain_setup(mib=4)) as made:
        perform(made, [name, *operation.most])
        perform(made, [name, *(0 for _ in operation.most)])
        made.close()


def test_zeros_that_nobody_asked_for() -> None:
    def plant(made: World) -> None:
        made.mem.vm[0].zeroed_bytes += 4096

    with World(plain_setup()) as made:
        perform(made, ["flush", 0])
        operation = OPERATIONS["flush"]

        def flush_and_zero(world: World, budget: int) -> None:
            operation.run(world, budget)
            plant(world)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(OPERATIONS, "flush", replace(operation, run=flush_and_zero))
            with pytest.raises(Violated, match="nobody had asked for zeros"):
                perform(made, ["flush", 0])


def test_a_page_that_stays_is_read_after_a_few_steps() -> None:
    with World(plain_setup(), thorough=False) as made:
        perform(made, ["mmap", 0, 2, 1])
        pfn = int(np.flatnonzero(made.mem.mem_map["mapping"][: made.pages])[0])
        made.bytes_of(pfn, 0)[5] ^= 1

        def wait() -> None:
            for _ in range(READ_AGAIN):
                perform(made, ["drain"])

        with pytest.raises(Violated, match="does not hold what was written"):
            wait()


@pytest.mark.parametrize("checked", [True, False])
def test_an_owner_leaves_its_flags(checked: bool) -> None:
    with World(plain_setup(debug_vm=checked, mib=8)) as made:
        perform(made, ["kernel_block", 3, 0, 0, 0, 7])
        assert made.private.sum() == 8
        pfn = made.blocks[0][0]
        perform(made, ["free_kernel_block", 0, 0])
        assert not made.private.any()
        assert not made.mem.mem_map[pfn].flags_f & PG_zeroed
        perform(made, ["take_run", 2, 0, 0, 0, 1])
        assert made.private.sum() == 4
        made.close()


def test_a_driver_of_another_kind_is_believed_bit_by_bit() -> None:
    with World(plain_setup()) as made:
        perform(made, ["foreign_reports", 0, 2, 1, 0b0101, 0])
        assert made.before is not None
        known = made.before.pages.zeroed
        assert known.any()
        assert (made.host.told & ~known).any()
        assert not (known & ~made.host.zero).any()


def test_a_driver_that_promises_nothing_is_not_believed() -> None:
    with World(plain_setup()) as made:
        perform(made, ["foreign_reports", 0, 2, 0, 0xFFFF, 0])
        assert made.before is not None
        assert made.host.told.any()
        assert not made.before.pages.zeroed.any()


def test_a_driver_fails_once() -> None:
    with World(plain_setup()) as made:
        perform(made, ["foreign_reports", 0, 2, 1, 0xFFFF, 1])
        assert made.mm.page_reporting.failed_calls == 1
        assert made.before is not None
        assert made.before.pages.zeroed.any()


def test_a_list_that_holds_a_page_twice() -> None:
    with World(plain_setup()) as made:
        assert made.before is not None
        pages = made.before.pages
        large = int(np.flatnonzero((pages.place == FREE) & (pages.order > 3))[0])
        head, small = int(pages.head[large]), int(pages.head[large]) + 1
        record, other = made.mem.mem_map[head], made.mem.mem_map[small]
        # A page from inside the block follows it on its list.
        following = int(record.lru_next)
        other.lru_prev, other.lru_next, other.private = head, following, record.private
        record.lru_next = made.mem.mem_map[following].lru_prev = small
        with pytest.raises(Violated):
            take_inventory(made.mem)


def test_a_fault_that_zeroes_itself_backs_its_page() -> None:
    with world(["flush", 0], ["mmap", 0, 4, 2], user_zeroing="caller", mib=8) as made:
        made.close()
