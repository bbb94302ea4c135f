# SPDX-License-Identifier: GPL-2.0-only
"""Queues that are served in turns, stop, and go on: what the model expects of them, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import hostzero.check.wire.device_pauses  # noqa: F401 - its steps make themselves known
from hostzero.check.violation import Violated
from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.device_moves import ALL
from hostzero.check.wire.device_places import ANSWERS_AT
from hostzero.check.wire.wire_rings import WRITE

SETUP = {"offered": ALL & ~(1 << 29), "backing": "anonymous", "granule": 1, "discard_hints": 0}
START: list[object] = ["start", ALL, 5, 0]
REPORTS: list[list[object]] = [["chain", 4, 0, 8 * PAGE, PAGE, WRITE], ["chain", 4, 1, 9 * PAGE, PAGE, WRITE]]
STATS: list[list[object]] = [["put", ANSWERS_AT, 10, 5], ["chain", 2, 0, ANSWERS_AT, 10, 0], ["kick", 2]]
ANOTHER: list[list[object]] = [["chain", 2, 1, ANSWERS_AT, 10, 0], ["kick", 2]]


@pytest.fixture
def world() -> Iterator[DeviceWorld]:
    made = DeviceWorld(SETUP)
    made.step(START)
    yield made
    made.close()


def do(world: DeviceWorld, *steps: list[object]) -> None:
    for step in steps:
        world.step(step)


def test_a_queue_is_served_in_turns(world: DeviceWorld) -> None:
    do(world, *REPORTS, ["kick_some", 4, 1])
    assert world.device.metrics.reporting.requests == 1
    do(world, ["kick_some", 4, 5], ["kick_some", 4, 1], ["kick_some", 7, 1])
    assert world.device.metrics.reporting.claims == 2


def test_a_queue_stops_and_goes_on_with_what_waits(world: DeviceWorld) -> None:
    do(world, *REPORTS, ["kick_some", 4, 1], ["stop", 4], ["stop", 4])
    assert 4 in world.stopped
    do(world, ["resume", 4], ["resume", 4], ["kick", 4])
    assert world.device.metrics.reporting.claims == 2


def test_a_buffer_that_is_kept_becomes_available_again_or_comes_back(world: DeviceWorld) -> None:
    do(world, *STATS, ["stop", 2])
    assert world.stopped[2].last == 0
    do(world, ["resume", 2], ["kick", 2], ["request_stats"], *STATS, *ANOTHER, ["stop", 2])
    assert world.stopped[2].last == 3


def test_a_guest_is_paused_and_goes_on_with_other_features(world: DeviceWorld) -> None:
    do(world, ["write_config", 12, 4, 7], ["same_memory"], ["suspend"], ["same_memory"])
    assert not world.model.rings
    do(world, ["wake", ALL & ~2], *REPORTS, ["kick", 3])
    assert world.model.rings[3].role == "reporting"
    assert world.model.poison == 7


def test_a_reset_in_the_last_interrupt_of_a_queue_that_stops(world: DeviceWorld) -> None:
    do(world, *STATS, *ANOTHER, ["at_interrupt", 1, 0, 0], ["stop", 2])
    assert not world.model.rings
    assert not world.stopped
    do(world, START, *STATS)


PLANTS: list[tuple[str, list[list[object]], Callable[[DeviceWorld], None]]] = [
    (
        "whether its budget ran out",
        [*REPORTS, ["kick_some", 4, 1]],
        lambda world: setattr(world.device, "serve", _forgetful(world.device.serve)),
    ),
    (
        "not be resumed where it stopped",
        [*REPORTS, ["kick", 4], ["stop", 4]],
        lambda world: setattr(world.device, "stop_queue", _forgetful(world.device.stop_queue)),
    ),
]


def _forgetful(function: Callable[..., object]) -> Callable[..., object]:
    return lambda *args: function(*args) and 0


@pytest.mark.parametrize(("what", "steps", "plant"), PLANTS)
def test_each_check_sees_its_fault(
    world: DeviceWorld, what: str, steps: list[list[object]], plant: Callable[[DeviceWorld], None]
) -> None:
    plant(world)
    with pytest.raises(Violated, match=what):
        do(world, *steps)


def test_another_buffer_in_the_last_interrupt_of_a_queue_that_stops(world: DeviceWorld) -> None:
    do(world, *STATS, *ANOTHER, ["at_interrupt", 2, 2, 1], ["stop", 2])
    assert world.stopped[2].last == 2
    do(world, ["resume", 2], ["kick", 2])
    assert world.model.rings[2].held is not None


def test_a_reset_in_the_last_interrupt_of_a_broken_queue_that_stops(world: DeviceWorld) -> None:
    """The reset forgets that the driver offered a buffer which the device had."""
    do(world, *STATS, ["chain", 2, 1, 0, 0, 0], ["kick", 2], ["chain", 2, 0, ANSWERS_AT, 10, 0], ["kick", 2])
    assert world.model.needs_reset
    do(world, ["at_interrupt", 1, 0, 0], ["stop", 2])
    assert world.device.status() == 0
    assert not world.model.needs_reset


def test_a_reset_in_the_last_interrupt_of_a_suspension(world: DeviceWorld) -> None:
    do(world, *STATS, *ANOTHER, ["at_interrupt", 1, 0, 0], ["suspend"])
    assert not world.stopped


def test_an_answer_in_the_middle_of_statistics_may_come_before_or_after_them() -> None:
    setup = SETUP | {"offered": 536871163, "backing": "memfd", "granule": 8, "shape": 2, "proves": 1}
    made = DeviceWorld(setup)
    steps: list[list[object]] = [
        ["start", 314572862, 1, *[0] * 13],
        # An inflate request whose bitmap is the second byte of the statistics, and both wait.
        ["chain", 0, 0, 0, 4, 0, 229376, 1, WRITE],
        ["put", 229376, 2, 103958667301477982339073],
        ["chain", 2, 0, 229375, 10, 0],
        ["suspend"],
        ["wake", 392167578],
    ]
    for step in steps:
        made.step(step)
    assert made.device.stats == made.model.figures != {}
    made.close()
