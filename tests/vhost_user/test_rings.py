# SPDX-License-Identifier: GPL-2.0-only
"""Rings being served: turns, floods, rests, and rings that break."""

from __future__ import annotations

import os
import struct

import pytest

from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.payloads import MemTable
from hostzero.vhost_user.rings import IDLE_KICKS_MAX, REQUESTS_PER_TURN
from hostzero.virtio.features import QueueRole
from tests.vhost_user.backend import Pair
from tests.vhost_user.front_end import FILL, HIGH_BYTES, HIGH_GPA, RING_SIZE, SCRATCH_AT

GIB = 1 << 30


def fill_ring(front_end: Pair, role: QueueRole, count: int) -> None:
    """Offer the same page again and again, without a kick."""
    ring = front_end.rings[role]
    for head in range(count):
        ring.descriptor(head, 5 * PMD_SIZE, PAGE_SIZE, 2)
    ring.offer(*range(count))


def test_a_full_ring_is_served_in_turns(running: Pair) -> None:
    """Between two turns everybody else is looked after; no further kick is needed."""
    fill_ring(running, QueueRole.REPORTING, RING_SIZE)
    running.kick(QueueRole.REPORTING)
    loop, ring = running.backend.loop, running.rings[QueueRole.REPORTING]
    answered = []
    while loop.turn():
        answered.append(ring.used_idx)
        assert running.number(17) == 5, "a message between two turns is answered"
        # `number` lets the backend come to rest, so the first turn is the only one to be counted.
        break
    assert answered == [REQUESTS_PER_TURN]
    assert ring.used_idx == RING_SIZE


def test_each_turn_answers_so_many_and_no_more(running: Pair) -> None:
    fill_ring(running, QueueRole.REPORTING, 3 * REQUESTS_PER_TURN + 1)
    running.kick(QueueRole.REPORTING)
    steps = []
    while running.backend.loop.turn():
        steps.append(running.rings[QueueRole.REPORTING].used_idx)
    assert steps == [8, 16, 24, 25]


def test_a_kick_while_a_turn_is_due_is_taken_and_adds_no_turn(running: Pair) -> None:
    fill_ring(running, QueueRole.REPORTING, 2 * REQUESTS_PER_TURN)
    for _ in range(3):
        running.kick(QueueRole.REPORTING)
        running.backend.loop.turn()
    assert running.rings[QueueRole.REPORTING].used_idx == 2 * REQUESTS_PER_TURN
    assert running.metrics.empty_kicks == 0


def test_a_turn_that_is_due_is_forgotten_when_the_ring_stops(running: Pair) -> None:
    fill_ring(running, QueueRole.REPORTING, 2 * REQUESTS_PER_TURN)
    running.kick(QueueRole.REPORTING)
    running.backend.loop.turn()
    index = running.indices[QueueRole.REPORTING]
    running.session.rings.enable(index, False)
    running.pump()
    assert running.rings[QueueRole.REPORTING].used_idx == REQUESTS_PER_TURN
    assert running.session.rings.vrings[index].base == REQUESTS_PER_TURN


@pytest.mark.parametrize("request_of", ["kick", "enable", "table"])
def test_requests_about_a_ring_add_no_turn_to_the_one_that_is_due(running: Pair, request_of: str) -> None:
    """Each started a chain of turns of its own before, and all of them were served in one turn."""
    ring, index = running.rings[QueueRole.REPORTING], running.indices[QueueRole.REPORTING]
    rings, loop = running.session.rings, running.backend.loop
    fill_ring(running, QueueRole.REPORTING, RING_SIZE)
    running.kick(QueueRole.REPORTING)
    loop.turn()
    for _ in range(4):
        if request_of == "kick":
            rings.use_kick(rings.vrings[index], Fd(os.dup(running.kicks[index])))
        elif request_of == "enable":
            rings.enable(index, False)
            rings.enable(index, True)
        else:
            table = MappedTable(MemTable.parse(running.memory.table()), [running.memory.fd] * 2)
            rings.remap(table)
    steps = [ring.used_idx]
    while loop.turn():
        steps.append(ring.used_idx)
    assert steps[:4] == [8, 16, 24, 32]
    assert steps[-1] == RING_SIZE
    assert len(steps) <= RING_SIZE // REQUESTS_PER_TURN + 1


def test_a_ring_that_starts_is_served_in_a_turn_of_its_own(running: Pair) -> None:
    """So a front end that starts it again and again makes nobody wait for longer."""
    ring, index = running.rings[QueueRole.REPORTING], running.indices[QueueRole.REPORTING]
    rings = running.session.rings
    rings.enable(index, False)
    fill_ring(running, QueueRole.REPORTING, RING_SIZE)
    for _ in range(4):
        rings.enable(index, True)
        rings.enable(index, False)
    rings.enable(index, True)
    assert ring.used_idx == 0
    running.backend.loop.turn()
    assert ring.used_idx == REQUESTS_PER_TURN


def test_a_ring_that_is_started_while_a_turn_is_due_is_served(running: Pair) -> None:
    """The turn that was due is the one in which what came meanwhile is found; no kick says so."""
    ring, index = running.rings[QueueRole.REPORTING], running.indices[QueueRole.REPORTING]
    fill_ring(running, QueueRole.REPORTING, REQUESTS_PER_TURN + 1)
    running.kick(QueueRole.REPORTING)
    running.backend.loop.turn()
    running.session.rings.enable(index, False)
    running.session.rings.enable(index, True)
    running.pump()
    assert ring.used_idx == REQUESTS_PER_TURN + 1
    # And after that turn the next start has one again.
    running.session.rings.enable(index, False)
    ring.offer(0)
    running.session.rings.enable(index, True)
    running.pump()
    assert ring.used_idx == REQUESTS_PER_TURN + 2


def test_any_number_of_kicks_is_one_event(running: Pair) -> None:
    for _ in range(1000):
        running.kick(QueueRole.INFLATE)
    running.pump()
    assert running.metrics.kicks == 1


def test_kicks_for_nothing_are_left_unread_for_a_moment(running: Pair) -> None:
    for _ in range(10 * IDLE_KICKS_MAX):
        running.kick(QueueRole.INFLATE)
        running.pump()
    assert running.metrics.kicks == running.metrics.empty_kicks == IDLE_KICKS_MAX
    # The other queues, and messages, are served as ever.
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE
    running.backend.loop.rest()
    running.pump()
    assert running.metrics.empty_kicks == IDLE_KICKS_MAX + 1, "one more, and it rests again"
    running.put(QueueRole.INFLATE, [(SCRATCH_AT, 4)])
    running.backend.loop.rest()
    running.kick(QueueRole.INFLATE)
    running.wait_call(QueueRole.INFLATE)
    for _ in range(3):
        running.kick(QueueRole.INFLATE)
        running.pump()
    assert running.metrics.empty_kicks == IDLE_KICKS_MAX + 4, "after a request it is listened to again"


def test_a_rest_ends_with_the_ring(running: Pair) -> None:
    for _ in range(IDLE_KICKS_MAX):
        running.kick(QueueRole.INFLATE)
        running.pump()
    running.stop()
    running.backend.loop.rest()
    assert running.backend.loop.watched == {}


def test_a_new_kick_descriptor_ends_a_rest(running: Pair) -> None:
    for _ in range(IDLE_KICKS_MAX):
        running.kick(QueueRole.INFLATE)
        running.pump()
    index = running.indices[QueueRole.INFLATE]
    os.close(running.kicks[index])
    running.kicks[index] = os.eventfd(0, os.EFD_NONBLOCK)
    running.vring_fd(12, index, running.kicks[index])
    assert running.inflate([1024])[0] == 1
    running.backend.loop.rest()
    assert running.inflate([1025])[0] == 1


def test_a_broken_ring_is_told_and_the_others_go_on(running: Pair) -> None:
    index = running.indices[QueueRole.INFLATE]
    running.rings[QueueRole.INFLATE].set_avail_idx(0x8000)
    running.kick(QueueRole.INFLATE)
    running.pump()
    assert os.eventfd_read(running.errs[index]) == 1
    assert running.session.rings.vrings[index].broken
    running.config_changed()
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE
    running.kick(QueueRole.INFLATE)
    running.pump()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(running.errs[index])


def test_a_broken_ring_works_again_once_it_was_stopped(running: Pair) -> None:
    index = running.indices[QueueRole.INFLATE]
    running.rings[QueueRole.INFLATE].set_avail_idx(0x8000)
    running.kick(QueueRole.INFLATE)
    running.pump()
    running.stop()
    running.negotiate(running.session.rings.features or 0)  # type: ignore[arg-type]
    running.share()
    running.make_rings()
    running.describe_rings()
    running.enable()
    assert not running.session.rings.vrings[index].broken
    assert running.inflate([1024])[0] == 1


def test_a_flood_of_page_frame_zero_leaves_the_rings_alone(running: Pair) -> None:
    """As virtio-win sends them: each number of 64 bits, so every other one of 32 is 0."""
    running.memory.guest.write(Gpa(SCRATCH_AT), struct.pack("<2I", 1024, 0) * 2048)
    ring = running.rings[QueueRole.INFLATE]
    for head in range(RING_SIZE):
        ring.descriptor(head, SCRATCH_AT, 4 * 4096)
    ring.offer(*range(RING_SIZE))
    running.kick(QueueRole.INFLATE)
    running.pump()
    assert ring.used_idx == RING_SIZE
    metrics = running.device.metrics.inflate
    # Duplicates are joined: two discards for each request.
    assert metrics.discard_calls == 2 * RING_SIZE
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def test_descriptors_of_a_gibibyte_are_refused_where_there_is_no_such_memory(running: Pair) -> None:
    ring = running.rings[QueueRole.REPORTING]
    for head in range(RING_SIZE):
        ring.descriptor(head, HIGH_GPA, GIB, 2)
    ring.offer(*range(RING_SIZE))
    running.kick(QueueRole.REPORTING)
    running.pump()
    assert [length for _, length in ring.returned()] == [0] * RING_SIZE
    assert running.device.metrics.reporting.malformed == RING_SIZE
    assert running.memory.guest.read(Gpa(HIGH_GPA), HIGH_BYTES) == bytes([FILL]) * HIGH_BYTES
    assert running.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE
