# SPDX-License-Identifier: GPL-2.0-only
"""Sets of bytes against Python sets, one byte at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device.byte_ranges import ByteRanges, overlap_each_other, ring_segments
from hostzero.ram import GuestMemory, Ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.ring_layout import RingLayout

# So few bytes that ranges touch, overlap and just miss each other in most examples.
SEGMENTS = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 4)), max_size=5)


def _bytes(segments: list[tuple[int, int]]) -> set[int]:
    return {byte for start, length in segments for byte in range(start, start + length)}


@given(SEGMENTS)
def test_segments_are_the_same_bytes_apart_and_in_order(segments: list[tuple[int, int]]) -> None:
    joined = ByteRanges(segments).segments()
    assert _bytes(joined) == _bytes(segments)
    assert all(a + length < b for (a, length), (b, _) in itertools.pairwise(joined))
    assert all(length > 0 for _, length in joined)


@given(SEGMENTS, st.integers(0, 18), st.integers(0, 5))
def test_overlap_is_a_shared_byte(segments: list[tuple[int, int]], start: int, length: int) -> None:
    shared = _bytes(segments) & set(range(start, start + length))
    assert ByteRanges(segments).overlaps(start, length) == bool(shared)


@given(SEGMENTS, SEGMENTS)
def test_union(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    both = ByteRanges(ours) | ByteRanges(theirs)
    assert _bytes(both.segments()) == _bytes(ours) | _bytes(theirs)
    assert bool(both) == bool(_bytes(ours + theirs))


EDGES = st.builds(lambda page, byte: page * PAGE_SIZE + byte, st.integers(0, 9), st.integers(-2, 2)).filter(
    lambda start: start >= 0
)


@given(st.lists(st.tuples(EDGES, st.sampled_from([0, 1, 2, 3, PAGE_SIZE, 3 * PAGE_SIZE])), max_size=6))
def test_pages_are_those_that_hold_a_byte(segments: list[tuple[int, int]]) -> None:
    pages = {byte // PAGE_SIZE for byte in _bytes(segments)}
    pfns = np.arange(14, dtype=np.int64)
    assert ByteRanges(segments).pages_mask(pfns).tolist() == [pfn in pages for pfn in range(14)]


@given(SEGMENTS)
def test_overlap_each_other_is_a_byte_counted_twice(segments: list[tuple[int, int]]) -> None:
    assert overlap_each_other(segments) == (len(_bytes(segments)) < sum(length for _, length in segments))


@pytest.mark.parametrize("size", [1, 128])
def test_ring_segments_are_the_three_parts_with_their_event_index(ram: Ram, size: int) -> None:
    layout = RingLayout.validated(GuestMemory.whole(ram), size, Gpa(0x4000), Gpa(0x8000), Gpa(0x9000))
    assert ring_segments(layout) == [(0x4000, 16 * size), (0x8000, 6 + 2 * size), (0x9000, 6 + 8 * size)]
