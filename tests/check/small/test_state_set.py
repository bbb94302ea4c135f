# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostzero.check.small.state_set import StateSet

# Few different values, and many that want the same slot.
WORDS = st.one_of(st.integers(-3, 3), st.sampled_from([1 << 12, 1 << 40, -(1 << 63), (1 << 63) - 1]))


@given(st.lists(st.tuples(WORDS, WORDS)))
def test_set_holds_what_was_added_and_nothing_else(pairs: list[tuple[int, int]]) -> None:
    seen = StateSet()
    model: set[tuple[int, int]] = set()
    for a, b in pairs:
        # (0, 0) marks a free slot and stands for its neighbour.
        key = (0, 1) if (a, b) == (0, 0) else (a, b)
        assert seen.add(a, b) == (key not in model)
        model.add(key)
    assert seen.count == len(model)


def test_everything_is_still_there_after_the_table_has_grown() -> None:
    seen = StateSet()
    before = len(seen.table)
    pairs = [(k << 8, k) for k in range(1, before // 2)]
    assert all(seen.add(a, b) for a, b in pairs)
    assert len(seen.table) > before
    assert not any(seen.add(a, b) for a, b in pairs)
    assert seen.count == len(pairs)
    # The table is two words a slot, and at most half of the slots are taken.
    assert len(seen.table) // 2 >= 2 * seen.count


def test_room_is_made_ahead_of_compiled_code_that_cannot_grow_the_table() -> None:
    seen = StateSet()
    states = 3 * seen.room
    needed = seen.bytes_with_room(states)
    old = seen.nbytes
    seen.make_room(states)
    assert seen.room >= states
    assert seen.nbytes == needed - old
