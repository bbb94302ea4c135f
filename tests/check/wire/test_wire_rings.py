# SPDX-License-Identifier: GPL-2.0-only
"""The second reading of virtio 1.3 agrees with the first one on rings of any bytes."""

from __future__ import annotations

import random

import pytest

from hostzero.check.wire.wire_rings import Place, Space, first_bytes, gather, overlap, parse_chain, passed
from hostzero.errors import RingError
from hostzero.ram import GuestMemory, open_ram
from hostzero.units import Gpa
from hostzero.virtio.chain import BadChain, walk_chain
from hostzero.virtio.ring_layout import DESC, RingLayout, need_event

SIZE = 2 << 20
SPACE = Space(((0, SIZE),))


def test_both_readings_find_the_same_in_any_table() -> None:
    rng = random.Random(1)
    lengths = [0, 1, 4096, SIZE, SIZE + 1, (1 << 32) - 1]
    with open_ram(SIZE) as ram:
        memory = GuestMemory.whole(ram)
        good = bad = 0
        for _ in range(600):
            size = rng.choice([1, 2, 4, 8])
            place = Place(size, 0, 4096, 8192)
            for at in range(size):
                addr = rng.choice([0, 1, SIZE - 1, SIZE, (1 << 64) - 1])
                flags = rng.choice([0, 0, 1, 1, 2, 3, 3, 4, 0x8001])
                DESC.pack_into(ram.buffer, 16 * at, addr, rng.choice(lengths), flags, rng.randrange(size + 1))
            head = rng.randrange(size)
            table = [DESC.unpack_from(ram.buffer, 16 * at) for at in range(size)]
            first = walk_chain(memory, size, head, lambda at, table=table: table[at])  # type: ignore[misc]
            second = parse_chain(lambda gpa, n: memory.read(Gpa(gpa), n), SPACE, place, head)
            assert isinstance(first, BadChain) == bool(second.bad)
            if isinstance(first, BadChain):
                bad += 1
            else:
                good += 1
                assert (first.readable, first.writable) == (second.readable, second.writable)
        assert good > 50
        assert bad > 50


@pytest.mark.parametrize("size", [0, 1, 3, 8, 32768, 65536])
def test_both_agree_on_where_a_ring_may_lie(size: int) -> None:
    rng = random.Random(size)
    with open_ram(SIZE) as ram:
        memory = GuestMemory.whole(ram)
        for _ in range(60):
            parts = [rng.choice([0, 16, 128, 4096, 4098, 4097, SIZE - 16, SIZE, -16]) for _ in range(3)]
            problem = Place(size, *parts).problem(SPACE)
            try:
                RingLayout.validated(memory, size, *parts)
            except RingError:
                assert problem
            else:
                assert not problem


def test_an_event_is_passed_as_the_specification_counts() -> None:
    rng = random.Random(2)
    for _ in range(300):
        old = rng.choice([0, 65530, 65535, 7])
        new = (old + rng.randrange(12)) & 0xFFFF
        event = (old + rng.randrange(-3, 14)) & 0xFFFF
        assert passed(event, new, old) == need_event(event, new, old)


def test_segments_are_gathered_cut_and_compared() -> None:
    data = bytes(range(100))
    segments = [(10, 4), (50, 3)]
    assert gather(lambda at, n: data[at : at + n], segments, 6) == bytes([10, 11, 12, 13, 50, 51])
    assert first_bytes(segments, 5) == [(10, 4), (50, 1)]
    assert overlap(segments, [(13, 1)])
    assert not overlap(segments, [(14, 36), (53, 9)])
