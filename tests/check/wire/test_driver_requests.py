# SPDX-License-Identifier: GPL-2.0-only
"""What a driver may put into its requests, and the numbers that it must keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import hostzero.check.wire.driver_steps  # noqa: F401 - its steps make themselves known
from hostzero.check.violation import Violated
from hostzero.check.wire.device_model import DEFLATE, HINT, INFLATE, PAGE, REPORT
from hostzero.check.wire.driver import HONEST_FEATURES, DriverWorld
from hostzero.check.wire.driver_requests import wrong_request
from hostzero.check.wire.false_device import WITHHOLD
from hostzero.check.wire.wire_rings import Parsed
from hostzero.mm.gfp import GFP_KERNEL

PROBE: list[object] = ["probe", HONEST_FEATURES]
ARRAY_AT = 900 * PAGE


@pytest.fixture
def world() -> Iterator[DriverWorld]:
    made = DriverWorld({"guest": "plain"})
    yield made
    made.close()


def array(world: DriverWorld, *pfns: int) -> Parsed:
    data = b"".join(pfn.to_bytes(4, "little") for pfn in pfns)
    # Each has its own place, so that several can be there at once.
    at = ARRAY_AT + 64 * (sum(pfns) % 61)
    world.mm.ram_bytes[at : at + len(data)] = list(data)
    return Parsed(0, ((at, len(data)),) if data else ())


def test_each_rule_of_a_request(world: DriverWorld) -> None:
    mine = int(world.mm.alloc_pages(GFP_KERNEL, 1))
    free = world.mm.nr_pages - 1
    users = [(mine, 0, 1)]

    def wrong(role: str, parsed: Parsed) -> str | None:
        return wrong_request(world.mm, users, [(5 * PAGE, 8)], role, parsed)

    owned = mine + 1
    assert wrong(INFLATE, array(world, owned)) is None
    assert wrong(REPORT, Parsed(0, (), ((owned * PAGE, PAGE),))) is None
    assert wrong(HINT, Parsed(0, ((0, 4),))) is None
    for role, parsed, what in (
        (INFLATE, Parsed(0, bad="a loop"), "is a loop"),
        (REPORT, Parsed(0, (), ((5 * PAGE, PAGE),)), "in use for something else"),
        (INFLATE, Parsed(0, ((8, 8),), ((8, 1),)), "in use for something else"),
        (DEFLATE, array(world), "no whole array"),
        (INFLATE, array(world, owned, owned), "twice"),
        (INFLATE, array(world, 2_000_003), "does not have"),
        (DEFLATE, array(world, mine), "somebody in the guest uses"),
        (DEFLATE, array(world, free), "free for anybody"),
        (REPORT, Parsed(0, (), ((owned * PAGE, PAGE), (owned * PAGE + PAGE, PAGE))), "more than one"),
        (REPORT, Parsed(0, (), ((owned * PAGE, 512),)), "a part of a page"),
        (HINT, Parsed(0, (), ((free * PAGE, PAGE),)), "free for anybody"),
    ):
        assert what in str(wrong(role, parsed))


def do(world: DriverWorld, *steps: list[object]) -> None:
    for step in steps:
        world.step(step)


PLANTS: list[tuple[str, Callable[[DriverWorld], object]]] = [
    ("does not count its balloon", lambda world: world.mm.adjust_managed_page_count(1)),
    ("how many pages are in its balloon", lambda world: world.mm.balloon.dequeue(1)),
    ("not told how large", lambda world: world.device.written.update({4: 3})),
    ("not told what free pages hold", lambda world: world.device.written.update({12: 3})),
]


@pytest.mark.parametrize(("what", "plant"), PLANTS)
def test_each_number_is_looked_at(what: str, plant: Callable[[DriverWorld], object]) -> None:
    world = DriverWorld({"guest": "init_on_free"})
    world.step(PROBE)
    world.step(["target", 4])
    plant(world)
    with pytest.raises(Violated, match=what):
        world.step(["stats"])
    world.close()


def test_a_guest_without_memory(world: DriverWorld) -> None:
    steps: list[list[object]] = [PROBE, ["target", 9], ["hog", 0], ["alloc", 0, 0], ["target", 40]]
    do(world, *steps, ["freeze"], ["restore", 0], ["end"])


def test_a_large_guest_has_blocks_to_hint() -> None:
    world = DriverWorld({"guest": "plain", "mib": 16})
    world.step(["probe", HONEST_FEATURES | 8])
    world.step(["command", 0x8000_0000])
    assert world.driver.num_free_page_blocks
    do(world, ["command", 1], ["interrupt", 3], ["lie", WITHHOLD, 0], ["command", 7], ["end"])
    world.close()


def test_a_range_is_taken_from_the_balloon(world: DriverWorld) -> None:
    world.step(PROBE)
    world.step(["target", 33])
    for first in range(world.mm.nr_pages // 32):
        world.step(["contig", first, 5])
    world.step(["end"])


def test_a_device_that_offers_less_when_the_guest_wakes_up(world: DriverWorld) -> None:
    do(world, PROBE, ["freeze"], ["offer", HONEST_FEATURES & ~32], ["resize", 0, 8], ["restore", 0])
    assert world.driver.state.value == "frozen"
    do(world, ["offer", HONEST_FEATURES], ["restore", 0], ["end"])


def test_a_guest_that_only_slept_remembers(world: DriverWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    do(world, PROBE, ["flush", 4], ["freeze"], ["restore", 0], ["freeze"])
    restore = world.driver.restore
    monkeypatch.setattr(world.driver, "restore", lambda *, hibernated: restore(hibernated=True))
    with pytest.raises(Violated, match="lay untouched"):
        world.step(["restore", 0])
