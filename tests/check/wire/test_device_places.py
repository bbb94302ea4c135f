# SPDX-License-Identifier: GPL-2.0-only
"""Where a hostile guest puts things: rings anywhere that is allowed, across page borders above all."""

from __future__ import annotations

import itertools
import random

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.device_places import Places
from hostzero.check.wire.shadow import REGIONS
from hostzero.check.wire.wire_rings import Place, Space

SPACE = Space(tuple((first * PAGE, (first + count) * PAGE) for first, _, count in REGIONS))


def test_rings_lie_where_the_specification_allows_and_apart_from_each_other() -> None:
    alone = 0
    for seed in range(200):
        sizes = [8, 4, 2, 16, 32]
        addresses = Places(random.Random(seed)).rings(sizes)
        assert len(addresses) % 3 == 0
        places = [
            Place(size, *addresses[3 * n : 3 * n + 3]) for n, size in enumerate(sizes[: len(addresses) // 3])
        ]
        assert all(not place.problem(SPACE) for place in places)
        parts = sorted(part for place in places for part in place.parts())
        assert all(one + length <= other for (one, length), (other, _) in itertools.pairwise(parts))
        alone += sum((start + length) % PAGE == 2 for start, length in parts)
    # Many an event index is in a page of its own.
    assert alone > 200


def test_pages_meet_those_of_rings() -> None:
    places = Places(random.Random(1))
    places.usual_rings(5)
    pages = [places.page() for _ in range(200)]
    assert sum(63 <= page <= 69 for page in pages) > 20
    places.forget()
    assert not any(63 <= places.page() <= 69 for _ in range(200))


def test_addresses_are_never_negative() -> None:
    places = Places(random.Random(2))
    assert all(places.address(0) >= 0 for _ in range(500))
