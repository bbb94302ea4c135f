# SPDX-License-Identifier: GPL-2.0-only
"""The fuzzer of the driver: a good driver stands every lie, and each check sees its fault."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

import hostzero.check.wire.driver_steps  # noqa: F401 - its steps make themselves known
from hostzero.check.violation import Violated
from hostzero.check.wire.device_model import INIT_ON_INFLATE, PAGE
from hostzero.check.wire.driver import GUESTS, HONEST_FEATURES, DriverWorld
from hostzero.check.wire.driver_moves import DriverMoves
from hostzero.check.wire.false_device import (
    CALLS_MAX,
    JUMP,
    LENGTH,
    LIES,
    OFF_BY,
    SHORT_BITMAP,
    SOME,
    WITHHOLD,
)
from hostzero.driver import State, negotiate
from hostzero.driver.buffers import DriverBuffers
from hostzero.driver.config_space import ConfigSpace
from hostzero.driver.inflate import Inflation
from hostzero.driver.reporting import FreePageReporting
from hostzero.errors import UsageError, VmBug
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.page_flags import PG_zeroed, PGTY_buddy, PGTY_offline
from hostzero.units import Gpa
from hostzero.virtio.ring_layout import Segment

PROBE: list[object] = ["probe", HONEST_FEATURES]


@pytest.fixture
def world() -> Iterator[DriverWorld]:
    made = DriverWorld({"guest": "plain"})
    yield made
    made.close()


def do(world: DriverWorld, *steps: list[object]) -> None:
    for step in steps:
        world.step(step)


def marked_balloon_pages(world: DriverWorld) -> int:
    pages = world.mm.mem.mem_map[: world.mm.nr_pages]
    return int(np.count_nonzero((pages["page_type"] == PGTY_offline) & (pages["flags_f"] & PG_zeroed != 0)))


@pytest.mark.parametrize("guest", GUESTS)
def test_an_honest_device_is_believed_where_it_may_be(guest: str) -> None:
    world = DriverWorld({"guest": guest})
    do(world, PROBE, ["target", 9], ["flush", 4])
    assert marked_balloon_pages(world) == (9 if world.trusting else 0)
    assert bool(any(world.device.said.values())) == world.trusting
    world.step(["end"])
    world.close()


def test_bits_behind_the_length_that_is_said_are_dirt(world: DriverWorld) -> None:
    world.step(PROBE)
    world.step(["lie", SHORT_BITMAP, 0])
    world.step(["target", 20])
    assert marked_balloon_pages(world) == 8


def test_some_pages_are_zero_and_others_not(world: DriverWorld) -> None:
    world.step(PROBE)
    world.step(["lie", SOME, 0b101])
    world.step(["target", 4])
    assert marked_balloon_pages(world) == 2


@pytest.mark.parametrize("kind", range(LIES))
def test_every_lie_costs_time_at_most(world: DriverWorld, kind: int) -> None:
    do(
        world,
        ["alloc", 2, 0],
        PROBE,
        ["lie", kind, 3],
        ["target", 9],
        ["lie", kind, 3],
        ["flush", 3],
        ["alloc", 3, 1],
        ["end"],
    )


def test_a_device_that_does_not_answer_is_reset(world: DriverWorld) -> None:
    do(world, PROBE, ["lie", WITHHOLD, 0], ["target", 9])
    assert world.driver.state is State.FAILED
    assert world.device.status() == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_hosts_find_nothing(seed: int) -> None:
    moves = DriverMoves(seed)
    for _ in range(3):
        setup, steps = moves.episode()
        world = DriverWorld(setup)
        for step in steps:
            world.step(step)
        world.close()


def test_a_seed_always_gives_the_same_steps_and_they_are_json() -> None:
    episodes = [DriverMoves(5).episode() for _ in range(2)]
    assert episodes[0] == episodes[1] != DriverMoves(6).episode()
    assert json.loads(json.dumps(episodes[0][1])) == episodes[0][1]


def test_an_index_that_jumps_says_what_the_entry_says_that_comes_into_view(world: DriverWorld) -> None:
    # The used ring is empty: the entry names head 0, as the request does, and a length of 0.
    world.step(PROBE)
    world.step(["lie", JUMP, 1])
    world.step(["target", 1])
    assert world.driver.state is State.ACTIVE
    assert marked_balloon_pages(world) == 0


# ---- each check sees its fault


def test_a_length_that_is_not_exact_and_believed(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FreePageReporting.virtballoon_free_page_report

    def believes_all(reporting: FreePageReporting, entries: object) -> None:
        honest(reporting, entries)  # type: ignore[arg-type]
        reporting.pr_dev_info.zeroed_bitmap[:] = True

    monkeypatch.setattr(FreePageReporting, "virtballoon_free_page_report", believes_all)
    world.step(PROBE)
    world.step(["lie", OFF_BY, -1])
    with pytest.raises(Violated, match="nobody promised that"):
        world.step(["flush", 4])


def test_a_promise_that_is_lost(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FreePageReporting.virtballoon_free_page_report

    def believes_nothing(reporting: FreePageReporting, entries: object) -> None:
        honest(reporting, entries)  # type: ignore[arg-type]
        reporting.pr_dev_info.zeroed_bitmap[:] = False

    monkeypatch.setattr(FreePageReporting, "virtballoon_free_page_report", believes_nothing)
    world.step(PROBE)
    with pytest.raises(Violated, match="promised to be zero and does not count") as found:
        world.step(["flush", 4])
    assert found.value.violation.kind == "lost"


def test_a_read_behind_what_was_given(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def bitmap(buffers: DriverBuffers, count: int) -> bytes:
        del count
        return world.memory.read(Gpa(buffers._base + 1024), 32)

    monkeypatch.setattr(DriverBuffers, "bitmap", bitmap)
    world.step(PROBE)
    with pytest.raises(Violated, match="reads what it did not give"):
        world.step(["target", 3])


def test_a_users_page_that_changes(world: DriverWorld) -> None:
    world.step(["alloc", 0, 0])
    pfn = world.users[0][0]
    world.bytes[pfn * PAGE + 7] ^= 1
    with pytest.raises(Violated, match="of the guest's user has changed") as found:
        world.step(["stats"])
    assert (found.value.violation.pfn, found.value.violation.wrong_offset) == (pfn, 7)


def test_a_free_block_that_is_marked_and_dirty(world: DriverWorld) -> None:
    pages = world.mm.mem.mem_map[: world.mm.nr_pages]
    pfn = int(np.flatnonzero(pages["page_type"] == PGTY_buddy)[0])
    world.mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    with pytest.raises(Violated, match="believes to be zero is not"):
        world.step(["stats"])


@pytest.mark.parametrize("marked", [True, False])
def test_a_balloon_page_with_a_mark_too_many_or_too_few(world: DriverWorld, marked: bool) -> None:
    world.step(PROBE)
    world.step(["lie", SOME, 0 if marked else 0xFFFF])
    world.step(["target", 1])
    pages = world.mm.mem.mem_map[: world.mm.nr_pages]
    pfn = int(np.flatnonzero(pages["page_type"] == PGTY_offline)[0])
    world.bytes[pfn * PAGE : (pfn + 1) * PAGE] = 0
    world.mm.mem.mem_map[pfn].flags_f ^= PG_zeroed
    what = "nobody promised that" if marked else "promised to be zero and does not count"
    with pytest.raises(Violated, match=what):
        world.step(["stats"])


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (VmBug("a list"), "an assertion of the guest fails at a call"),
        (KeyError("x"), "KeyError comes out of the driver at a call"),
        (OSError(5, "no transport said so"), "OSError comes out of the driver at a call"),
        (UsageError("pages"), "a user's error comes out"),
    ],
)
def test_an_error_that_is_not_documented(world: DriverWorld, error: Exception, what: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(Violated, match=what):
        world.call("a call", fail)


def test_work_without_an_end(world: DriverWorld) -> None:
    def loop() -> None:
        while True:
            world.device.status()

    with pytest.raises(Violated, match="does not come back from a loop"):
        world.call("a loop", loop)
    assert world.device.calls == CALLS_MAX + 1


def test_a_page_that_is_missing_in_the_end(world: DriverWorld) -> None:
    world.mm.alloc_pages(GFP_KERNEL, 0)
    with pytest.raises(Violated, match="pages are missing after remove"):
        world.step(["end"])


def test_a_failed_device_that_was_not_reset(world: DriverWorld) -> None:
    world.step(PROBE)
    world.driver.state = State.FAILED
    with pytest.raises(Violated, match="that failed was not reset"):
        world.step(["stats"])


def test_a_field_that_comes_back_short(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(space: ConfigSpace, offset: int, name: str) -> int:
        del name
        return int.from_bytes(space._transport.read_config(offset, 4), "little")

    monkeypatch.setattr(ConfigSpace, "_read", believe)
    do(world, PROBE, ["fault", 2, 3])
    with pytest.raises(Violated, match="a field that came back short"):
        world.step(["target", 5])


def test_rings_that_are_freed_under_a_device_that_does_not_reset(
    world: DriverWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negotiate, "reset", lambda transport: transport.set_status(0))
    do(world, PROBE, ["fault", 1, 1])
    with pytest.raises(Violated, match="a device which did not reset may still write to"):
        world.step(["remove"])


def test_lists_that_are_not_sound_in_the_end(world: DriverWorld) -> None:
    world.mm.mem.zone[0].nr_free_pages += 1
    with pytest.raises(Violated):
        world.step(["end"])


def test_dirty_reports_are_not_for_guests_that_rely_on_contents() -> None:
    for guest, dirties in (("plain", True), ("init_on_free", False)):
        world = DriverWorld({"guest": guest})
        world.step(PROBE)
        world.step(["lie", LENGTH, 1])
        world.step(["flush", 4])
        assert bool((world.bytes == 0xC7).any()) == dirties
        world.close()


def test_an_unknown_step_or_guest_is_a_usage_error(world: DriverWorld) -> None:
    with pytest.raises(UsageError, match="'fly'"):
        world.step(["fly"])
    with pytest.raises(UsageError, match="'none'"):
        DriverWorld({"guest": "none"})


def test_a_hibernated_guest_forgets_its_marks(world: DriverWorld) -> None:
    do(world, PROBE, ["target", 9], ["flush", 3], ["freeze"], ["restore", 1], ["alloc", 3, 1], ["end"])


def test_a_bitmap_that_still_holds_an_answer(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = DriverBuffers.clear_bitmap

    def keeps(buffers: DriverBuffers, count: int) -> Segment:
        room = clear(buffers, count)
        world.bytes[room.gpa] = 1
        return room

    monkeypatch.setattr(DriverBuffers, "clear_bitmap", keeps)
    world.step(PROBE)
    with pytest.raises(Violated, match="the bitmap is not empty"):
        world.step(["target", 4])


def test_a_bitmap_without_the_bit(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Inflation.tell_host
    monkeypatch.setattr(
        Inflation,
        "tell_host",
        lambda balloon, queue, pfns, bitmap=False: honest(balloon, queue, pfns, bitmap=True),
    )
    world.step(["probe", HONEST_FEATURES & ~INIT_ON_INFLATE])
    with pytest.raises(Violated, match="did not accept bit 7"):
        world.step(["target", 4])
