# SPDX-License-Identifier: GPL-2.0-only
"""Which rings may exist, and the event index rule."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio import RingLayout, Segment, contiguous_bytes, need_event, ring_bytes
from tests.virtio.memory import HIGH, LOW
from tests.virtio.naive import naive_need_event


@pytest.mark.parametrize(
    ("size", "expected"), [(1, (16, 8, 14)), (128, (2048, 262, 1030)), (32768, (524288, 65542, 262150))]
)
def test_ring_bytes_are_those_of_the_table_in_clause_2_7(size: int, expected: tuple[int, int, int]) -> None:
    assert ring_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, -128, 3, 127, 129, 32767, 65536, 1 << 40])
def test_a_size_that_is_no_power_of_two_is_refused(memory: GuestMemory, size: int) -> None:
    with pytest.raises(RingError, match=f"queue size of {size} is not a power of two"):
        ring_bytes(size)
    with pytest.raises(RingError, match=f"queue size of {size} is not a power of two"):
        RingLayout.validated(memory, size, 0, 0x1000, 0x2000)


def test_a_validated_layout_has_what_it_was_given(memory: GuestMemory) -> None:
    layout = RingLayout.validated(memory, 8, 0x2000, 0x1002, HIGH + 4)
    assert (layout.size, layout.desc, layout.avail, layout.used) == (8, 0x2000, 0x1002, HIGH + 4)


@pytest.mark.parametrize(
    ("desc", "avail", "used", "part"),
    [
        (0x1008, 0x2000, 0x3000, "descriptor table at 0x1008 is not aligned to 16"),
        (0x1000, 0x2001, 0x3000, "available ring at 0x2001 is not aligned to 2"),
        (0x1000, 0x2000, 0x3002, "used ring at 0x3002 is not aligned to 4"),
        (-16, 0x2000, 0x3000, "descriptor table at -0x10"),
    ],
)
def test_misaligned_parts_are_refused(
    memory: GuestMemory, desc: int, avail: int, used: int, part: str
) -> None:
    with pytest.raises(RingError, match=re.escape(part)):
        RingLayout.validated(memory, 8, desc, avail, used)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    "outside", [LOW, LOW - 16, HIGH - 16, HIGH + LOW - 16, (1 << 64) - 16, 1 << 64, 1 << 80]
)
def test_parts_outside_ram_are_refused(memory: GuestMemory, position: int, outside: int) -> None:
    """Also a part that starts inside and ends outside, and one whose end passes 2^64."""
    places = [0x1000, 0x2000, 0x3000]
    places[position] = outside
    with pytest.raises(RingError, match="is not all in guest memory"):
        RingLayout.validated(memory, 16, *places)


def test_a_part_may_end_at_the_last_byte_of_ram(memory: GuestMemory) -> None:
    desc_bytes, _, _ = ring_bytes(16)
    assert (
        RingLayout.validated(memory, 16, HIGH + LOW - desc_bytes, 0, 0x1000).desc == HIGH + LOW - desc_bytes
    )


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (0x1000, 0x1000, 0x3000),  # the same place
        (0x1000, 0x107E, 0x3000),  # the last two bytes of the table of 8
        (0x1000, 0x2000, 0x2014),  # the last two bytes of the available ring of 22
        (0x3040, 0x2000, 0x3000),  # the table starts inside the used ring of 70
    ],
)
def test_overlapping_parts_are_refused(memory: GuestMemory, desc: int, avail: int, used: int) -> None:
    with pytest.raises(RingError, match="runs into the"):
        RingLayout.validated(memory, 8, desc, avail, used)


@given(
    size=st.sampled_from([1, 2, 8]),
    desc=st.integers(0, 20).map(lambda n: 16 * n),
    avail=st.integers(0, 160).map(lambda n: 2 * n),
    used=st.integers(0, 80).map(lambda n: 4 * n),
)
def test_overlap_is_found_byte_by_byte(size: int, desc: int, avail: int, used: int) -> None:
    """Against sets of byte addresses."""
    parts = [set(range(at, at + n)) for at, n in zip((desc, avail, used), ring_bytes(size), strict=True)]
    disjoint = len(set.union(*parts)) == sum(map(len, parts))
    try:
        RingLayout.validated(GuestMemoryOfAnything(), size, desc, avail, used)
    except RingError:
        assert not disjoint
    else:
        assert disjoint


class GuestMemoryOfAnything(GuestMemory):
    def __init__(self) -> None:
        super().__init__([])

    def contains(self, gpa: Gpa, length: int) -> bool:
        return True


@pytest.mark.parametrize("size", [1, 2, 4, 1024])
def test_a_contiguous_ring_fits_its_bytes_exactly(memory: GuestMemory, size: int) -> None:
    base = Gpa(HIGH + LOW - (contiguous_bytes(size) + 15) // 16 * 16)
    layout = RingLayout.contiguous(memory, size, base)
    assert layout.desc == base
    assert layout.used + ring_bytes(size)[2] == base + contiguous_bytes(size)
    with pytest.raises(RingError, match="is not all in guest memory"):
        RingLayout.contiguous(memory, size, Gpa(base + 16))


def test_only_validation_makes_a_layout(memory: GuestMemory) -> None:
    with pytest.raises(TypeError, match="validated"):
        RingLayout()
    layout = RingLayout.contiguous(memory, 4, Gpa(0))
    with pytest.raises(TypeError):
        dataclasses.replace(layout, used=Gpa(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.size = 8  # type: ignore[misc]


def test_a_segment_is_an_address_and_a_length() -> None:
    assert Segment(Gpa(0x1000), 16) == (0x1000, 16)


@given(event=st.integers(0, 65535), old=st.integers(0, 65535), count=st.integers(0, 300))
def test_need_event_counts_entries(event: int, old: int, count: int) -> None:
    new = (old + count) % 65536
    assert need_event(event, new, old) is naive_need_event(event, new, old)


@given(old=st.integers(0, 65535), step=st.integers(-2, 302), count=st.integers(1, 300))
def test_need_event_counts_entries_near_the_event(old: int, step: int, count: int) -> None:
    """As above, with the event close by, where the answer changes."""
    new, event = (old + count) % 65536, (old + step) % 65536
    assert need_event(event, new, old) is (0 <= step < count)
    assert need_event(event, new, old) is naive_need_event(event, new, old)
