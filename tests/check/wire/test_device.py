# SPDX-License-Identifier: GPL-2.0-only
"""The fuzzer of the device: a good device passes, and each check sees the fault that it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

import hostzero.check.wire.device_steps  # noqa: F401 - its steps make themselves known
from hostzero.check.violation import Violated
from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.device_moves import ALL, Moves
from hostzero.check.wire.device_places import ANSWERS_AT, ARRAYS_AT
from hostzero.check.wire.wire_rings import WRITE
from hostzero.errors import DeviceError, UsageError
from hostzero.units import Gpa

SETUP = {"offered": ALL & ~(1 << 29), "backing": "anonymous", "granule": 1, "discard_hints": 0}
START: list[object] = ["start", ALL, 5, 0]
INFLATE: list[list[object]] = [
    ["pfns", ARRAYS_AT, 7, 3, 5],
    ["chain", 0, 0, ARRAYS_AT, 12, 0, ANSWERS_AT, 2, WRITE],
]
REPORT: list[list[object]] = [["chain", 4, 0, 8 * PAGE, 2 * PAGE, WRITE]]
KICK_INFLATE: list[object] = ["kick", 0]
KICK_REPORT: list[object] = ["kick", 4]
Plant = Callable[[DeviceWorld], None]


@pytest.fixture
def world() -> Iterator[DeviceWorld]:
    made = DeviceWorld(SETUP)
    yield made
    made.close()


def do(world: DeviceWorld, steps: list[list[object]]) -> None:
    for step in steps:
        world.step(step)


def used_entry(world: DeviceWorld, index: int, at: int = 0) -> int:
    place = world.place(index)
    assert place is not None
    return place.used_entry(at)


def after(world: DeviceWorld, plant: Callable[[], None]) -> None:
    """Do something behind the device's back when it has served a queue; nothing interrupts before."""
    notify = world.device.notify

    def notified(index: int) -> None:
        notify(index)
        plant()

    world.device.notify = notified  # type: ignore[method-assign]
    world.interrupt = lambda index: world._interrupted.add(index)  # type: ignore[method-assign]


def poke(world: DeviceWorld, gpa: int, data: bytes) -> None:
    world.memory.write(Gpa(gpa), data)


def test_a_good_device_serves_both(world: DeviceWorld) -> None:
    for step in [START, *INFLATE, KICK_INFLATE, *REPORT, KICK_REPORT]:
        world.step(step)
    assert world.device.metrics.inflate.claims == 3
    assert world.device.metrics.reporting.claims == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_guests_find_nothing(seed: int) -> None:
    moves = Moves(seed)
    for _ in range(8):
        setup, steps = moves.episode()
        world = DeviceWorld(setup)
        for step in steps:
            world.step(step)
        world.close()


def test_a_seed_always_gives_the_same_steps_and_they_are_json() -> None:
    episodes = [Moves(5).episode() for _ in range(2)]
    assert episodes[0] == episodes[1] != Moves(6).episode()
    assert json.loads(json.dumps(episodes[0][1])) == episodes[0][1]


PLANTS: list[tuple[str, list[list[object]], Plant]] = [
    (
        "a byte that it was not given",
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, 30 * PAGE + 5, b"\0")),
    ),
    (
        "a byte that it was not given",  # beside the bitmap
        [*INFLATE, KICK_INFLATE],
        lambda world: after(world, lambda: poke(world, ANSWERS_AT + 1, b"\0")),
    ),
    (
        "a byte that it was not given",  # the used ring, where no entry was due
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4, 1), b"\1")),
    ),
    (
        "says is zero is not",
        [*REPORT, KICK_REPORT],
        lambda world: setattr(world.memory, "discard", lambda gpa, length: True),
    ),
    (
        "says is zero is not",
        [*INFLATE, KICK_INFLATE],
        lambda world: setattr(world.memory, "discard", lambda gpa, length: True),
    ),
    (
        "not claimed to be zero",
        [*REPORT, KICK_REPORT],
        lambda world: setattr(world.memory, "discard", lambda gpa, length: False),
    ),
    (
        "not claimed to be zero",
        [*INFLATE, KICK_INFLATE],
        lambda world: setattr(world.memory, "discard", lambda gpa, length: False),
    ),
    (
        "larger than what the device may write",
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4) + 4, b"\1\x20\0\0")),
    ),
    (
        "larger than its bitmap may be",
        [*INFLATE, KICK_INFLATE],
        lambda world: after(world, lambda: poke(world, used_entry(world, 0) + 4, b"\2\0\0\0")),
    ),
    (
        "another head than the one that is due",
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4), b"\1\0\0\0")),
    ),
    (
        "a bit behind the last page",
        [*INFLATE, KICK_INFLATE],
        lambda world: after(world, lambda: poke(world, ANSWERS_AT, b"\x0f")),
    ),
    (
        "bitmap is not all written",
        [*INFLATE, KICK_INFLATE],
        lambda world: after(world, lambda: poke(world, used_entry(world, 0) + 4, b"\0\0\0\0")),
    ),
    (
        "into which nothing is written",
        [["pfns", ARRAYS_AT, 7], ["chain", 1, 0, ARRAYS_AT, 4, 0, ANSWERS_AT, 2, WRITE], ["kick", 1]],
        lambda world: after(world, lambda: poke(world, used_entry(world, 1) + 4, b"\1\0\0\0")),
    ),
    (
        "breaks a rule comes back with a used length",
        [["chain", 4, 0, PAGE, PAGE, WRITE, PAGE, 4, 0], ["kick", 4]],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4) + 4, b"\1\0\0\0")),
    ),
    (
        "does not come back",
        [*REPORT, KICK_REPORT],
        lambda world: setattr(world.device, "notify", lambda index: None),
    ),
    (
        "moves by more than the requests",
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4) - 2, b"\2\0")),
    ),
    (
        "the driver is not told",
        [*REPORT, KICK_REPORT],
        lambda world: setattr(world, "interrupt", lambda index: None),
    ),
    (
        "would not be told of",
        [*REPORT, KICK_REPORT],
        lambda world: after(world, lambda: poke(world, used_entry(world, 4) - 4, b"\1\0")),
    ),
    (
        "KeyError comes out",
        [KICK_REPORT],
        lambda world: setattr(world.device, "notify", lambda index: {}[index]),
    ),
    ("documents to take", [KICK_REPORT], lambda world: setattr(world.device, "notify", _refuse)),
    ("documents to refuse", [["kick", 5]], lambda world: setattr(world.device, "notify", lambda index: None)),
    (
        "the status is not",
        [KICK_REPORT],
        lambda world: setattr(world.device, "status", lambda: 64),
    ),
    (
        "configuration space does not hold",
        [["write_config", 4, 4, 9]],
        lambda world: setattr(world.device, "write_config", lambda offset, data: None),
    ),
    (
        "not the number that the features",
        [KICK_REPORT],
        lambda world: setattr(world.device, "queue_size_max", lambda index: 32),
    ),
    (
        "tell its host what the guest said",
        [["put", ANSWERS_AT, 10, 5], ["chain", 2, 0, ANSWERS_AT, 10, 0], ["kick", 2]],
        lambda world: after(world, lambda: world.device._stats.latest.clear()),
    ),
    (
        "counts more bytes claimed than proven",
        [KICK_REPORT],
        lambda world: setattr(world.device.metrics.reporting, "claimed_zero_bytes", 1),
    ),
    (
        "not be resumed where it stopped",
        [KICK_REPORT],
        lambda world: setattr(world.device, "last_avail", lambda index: 7),
    ),
    (
        "not told of a target",
        [["set_target", 3]],
        lambda world: world.device.on_config_change(lambda: None),
    ),
]


def _refuse(index: int) -> None:
    raise DeviceError(f"no queue {index}")


@pytest.mark.parametrize(
    ("what", "steps", "plant"), PLANTS, ids=[f"{n} {p[0]}" for n, p in enumerate(PLANTS)]
)
def test_each_check_sees_its_fault(
    world: DeviceWorld, what: str, steps: list[list[object]], plant: Plant
) -> None:
    world.step(START)
    plant(world)
    with pytest.raises(Violated, match=what) as found:
        do(world, steps)
    assert found.value.violation.history[-1] == str(steps[-1])


def test_a_claim_without_its_bit_is_seen(world: DeviceWorld) -> None:
    world.step(["start", ALL & ~(1 << 6), 5, 0])
    after(world, lambda: poke(world, used_entry(world, 4) + 4, (2 * PAGE).to_bytes(4, "little")))
    with pytest.raises(Violated, match="negotiated features do not allow"):
        do(world, [*REPORT, KICK_REPORT])


def test_a_fault_that_the_device_swallows_in_an_interrupt_is_seen(world: DeviceWorld) -> None:
    world.step(START)
    interrupt = world.interrupt

    def interrupted(index: int) -> None:
        poke(world, 30 * PAGE, b"\0")
        interrupt(index)
        poke(world, 30 * PAGE, world.ram.pattern(30)[:1])

    world.interrupt = interrupted  # type: ignore[method-assign]
    with pytest.raises(Violated, match="a byte that it was not given"):
        do(world, [*REPORT, KICK_REPORT])


def test_pages_of_earlier_requests_may_go_only_with_must_tell_host() -> None:
    """On host pages of 32 KiB the second half of a piece completes it only if the device may remember."""
    for word, claims in ((ALL, 4), (ALL & ~1, 0)):
        world = DeviceWorld({**SETUP, "granule": 8})
        world.step(["start", word, 5, 0])
        for first in (8, 12):
            world.step(["run", ARRAYS_AT, first, 4])
            world.step(["chain", 0, 0, ARRAYS_AT, 16, 0, ANSWERS_AT, 1, WRITE])
            world.step(["kick", 0])
        assert world.device.metrics.inflate.claims == claims
        world.close()


def test_a_command_may_lie_in_the_page_that_its_run_gives_away() -> None:
    """The first request is read before the second one drops the page, and the third one after it."""
    world = DeviceWorld({**SETUP, "offered": 8, "discard_hints": 1})
    world.step(["start", 8, 3, 0])
    world.step(["hint", 0])
    world.step(["put_command", ANSWERS_AT, 0])
    world.step(["chain", 2, 0, ANSWERS_AT, 4, 0])
    world.step(["chain", 2, 1, ANSWERS_AT - PAGE, 2 * PAGE, WRITE])
    world.step(["chain", 2, 2, ANSWERS_AT, 4, 0])
    world.step(["kick", 2])
    assert not any(world.ram.read(ANSWERS_AT - PAGE, 2 * PAGE))
    assert world.model.hints == {"stopped"}
    world.close()


def test_a_later_request_may_drop_the_page_of_a_bitmap() -> None:
    """Both were answered before anybody looked: the bits are gone with the page that they were in."""
    world = DeviceWorld(SETUP)
    world.step(START)
    world.step(["avail_flags", 0, 1])
    world.step(["pfns", ARRAYS_AT, 7, 3])
    world.step(["chain", 0, 0, ARRAYS_AT, 8, 0, 20 * PAGE + 5, 1, WRITE])
    world.step(["pfns", ARRAYS_AT + 64, 20])
    world.step(["chain", 0, 2, ARRAYS_AT + 64, 4, 0])
    world.step(["kick", 0])
    assert world.device.metrics.inflate.claims == 2
    assert not any(world.ram.read(20 * PAGE, PAGE))
    world.close()


def test_a_descriptor_is_rewritten_just_after_it_was_read(world: DeviceWorld) -> None:
    """The device goes on with what it read."""
    do(world, [START, *REPORT, ["race", 0, 20 * PAGE, PAGE], KICK_REPORT])
    place = world.place(4)
    assert place is not None
    assert world.ram.read(place.desc, 8) == (20 * PAGE).to_bytes(8, "little")
    assert world.device.metrics.reporting.claims == 1


def test_an_unknown_step_is_a_usage_error(world: DeviceWorld) -> None:
    with pytest.raises(UsageError, match="'fly'"):
        world.step(["fly", 1])
