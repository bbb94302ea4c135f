# SPDX-License-Identifier: GPL-2.0-only
"""Requests of a hostile guest: however they are cut, their bytes are those of the whole."""

from __future__ import annotations

import itertools
import random

import pytest

import hostzero.check.wire.device_steps  # noqa: F401 - its steps make themselves known
from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_model import INFLATE, PAGE
from hostzero.check.wire.device_places import Places
from hostzero.check.wire.device_requests import Requests
from hostzero.check.wire.wire_rings import WRITE

SETUP = {"offered": 0xFF, "backing": "anonymous", "granule": 1, "discard_hints": 0}


def requests(seed: int) -> Requests:
    rng = random.Random(seed)
    return Requests(rng, Places(rng))


def segments(fields: list[int]) -> list[tuple[int, int, int]]:
    return [(at, length, flags) for at, length, flags in zip(*[iter(fields)] * 3, strict=True)]


def test_page_numbers_in_many_pieces_are_read_as_one_array() -> None:
    world = DeviceWorld(SETUP)
    pieces, empty, bitmaps = 0, 0, 0
    for seed in range(150):
        made = requests(seed)
        steps, fields = made.pfn_request(0.0, INFLATE, 8)
        for step in steps:
            world.step(step)
        parts = segments(fields)
        assert len(parts) <= 8
        readable = [part for part in parts if not part[2] & WRITE]
        data = b"".join(world.ram.read(at, length) for at, length, _ in readable if length)
        numbers = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        assert numbers == made.named
        pieces += len(readable) > 1
        empty += any(not length for _, length, _ in parts)
        bitmaps += sum(bool(part[2] & WRITE) for part in parts) > 1
    assert min(pieces, empty, bitmaps) > 10
    world.close()


def test_page_numbers_come_in_every_order_with_gaps_and_twice() -> None:
    found = set()
    for seed in range(200):
        numbers = requests(seed)._numbers()
        steps = [b - a for a, b in itertools.pairwise(numbers)]
        found |= {
            "ascending" if steps and min(steps) > 0 else "",
            "descending" if steps and max(steps) < 0 else "",
            "descending with gaps" if steps and max(steps) < 0 and min(steps) < -1 else "",
            "twice" if len(set(numbers)) < len(numbers) else "",
            "twice in a row" if 0 in steps else "",
        }
    assert len(found - {""}) == 5


@pytest.mark.parametrize("room", [1, 2, 32])
def test_reports_are_of_whole_pages_cut_anywhere(room: int) -> None:
    odd = 0
    for seed in range(100):
        _, fields = requests(seed).pages_request(0.0, room)
        parts = segments(fields)
        assert sum(length for _, length, _ in parts) % PAGE == 0
        odd += any(length % PAGE for _, length, _ in parts)
    assert bool(odd) == (room > 1)
