# SPDX-License-Identifier: GPL-2.0-only
"""Descriptor chains as a guest may write them, against a walk over Python lists."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostzero.errors import RingError
from hostzero.ram import GuestMemory, open_ram
from hostzero.units import Gpa
from hostzero.virtio import BadChain, Chain, Segment
from hostzero.virtio.chain import walk_chain
from tests.virtio.memory import BUFFERS, HIGH, LOW, split_memory
from tests.virtio.naive import naive_walk

NEXT, WRITE, INDIRECT = 1, 2, 4

Table = Sequence[tuple[int, int, int, int]]


def walk(memory: GuestMemory, table: Table, head: int = 0) -> Chain | BadChain:
    """Walk a table, asserting that no descriptor is read twice."""
    seen: list[int] = []

    def read(index: int) -> tuple[int, int, int, int]:
        assert len(seen) < len(table), "more reads than descriptors"
        seen.append(index)
        return table[index]

    return walk_chain(memory, len(table), head, read)


def refusal(memory: GuestMemory, table: Table, head: int = 0) -> str:
    """Return the text of the error that a chain is refused with."""
    item = walk(memory, table, head)
    assert isinstance(item, BadChain)
    assert item.head == head
    return str(item.error)


def test_segments_keep_their_order_and_direction(memory: GuestMemory) -> None:
    table = [
        (0x100, 16, NEXT, 3),
        (0, 0, 0, 0),
        (HIGH, LOW, WRITE, 0),
        (0x200, 8, NEXT, 4),
        (0x300, 4, NEXT | WRITE, 2),
    ]
    chain = walk(memory, table)
    assert isinstance(chain, Chain)
    assert chain.head == 0
    assert chain.readable == (Segment(Gpa(0x100), 16), Segment(Gpa(0x200), 8))
    assert chain.writable == (Segment(Gpa(0x300), 4), Segment(HIGH, LOW))
    assert (chain.readable_len, chain.writable_len) == (24, 4 + LOW)


@pytest.mark.parametrize("loop", [0, 1, 2])
def test_a_loop_is_refused(memory: GuestMemory, loop: int) -> None:
    """Back to the head, to the middle, and to itself; also with empty segments."""
    for length in (0, 16):
        table = [(0, length, NEXT, 1), (0, length, NEXT, 2), (0, length, NEXT, loop)]
        assert refusal(memory, table) == "the chain has more than 3 descriptors: it loops (2.7.5)"


def test_a_chain_may_be_as_long_as_the_ring(memory: GuestMemory) -> None:
    table = [(i, 1, NEXT if i < 7 else 0, (i + 1) % 8) for i in range(8)]
    chain = walk(memory, table)
    assert isinstance(chain, Chain)
    assert chain.readable == tuple((i, 1) for i in range(8))


@pytest.mark.parametrize("following", [2, 3, 0x8000, 0xFFFF])
def test_a_next_outside_the_table_is_refused(memory: GuestMemory, following: int) -> None:
    table = [(0, 16, NEXT, following), (0, 16, 0, 0)]
    assert refusal(memory, table) == f"descriptor 0 goes on to {following} on a ring of 2"


@pytest.mark.parametrize("following", [2, 0xFFFF])
def test_a_next_without_the_flag_is_not_looked_at(memory: GuestMemory, following: int) -> None:
    assert isinstance(walk(memory, [(0, 16, 0, following), (0, 16, 0, 0)]), Chain)


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (LOW, 1),
        (LOW - 1, 2),
        (0, LOW + 1),
        (HIGH - 1, 2),
        (HIGH + LOW, 1),
        (HIGH + LOW - 1, 2),
        (0, 0xFFFF_FFFF),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 16, 16),
        ((1 << 64) - 0x1000, 0xFFFF_FFFF),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_bytes_outside_ram_are_refused(memory: GuestMemory, addr: int, length: int, flags: int) -> None:
    text = refusal(memory, [(addr, length, flags, 0)])
    assert text == f"descriptor 0, {length} bytes at {addr:#x}, is not all in guest memory"


@pytest.mark.parametrize(("addr", "length"), [(LOW - 1, 1), (HIGH + LOW - 1, 1), (0, LOW), (HIGH, LOW)])
def test_the_last_byte_of_ram_is_inside(memory: GuestMemory, addr: int, length: int) -> None:
    chain = walk(memory, [(addr, length, 0, 0)])
    assert isinstance(chain, Chain)
    assert chain.readable == ((addr, length),)


@pytest.mark.parametrize("length", [0, 16])
def test_readable_after_writable_is_refused(memory: GuestMemory, length: int) -> None:
    """Clause 2.7.4.2, also if one of the two segments is empty."""
    table = [(0, 16, NEXT, 1), (0, length, NEXT | WRITE, 2), (0, 16 - length, 0, 0)]
    assert refusal(memory, table) == ("descriptor 2 is device-readable after a device-writable one (2.7.4.2)")


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT])
@pytest.mark.parametrize("at", [0, 1])
def test_an_indirect_table_is_refused(memory: GuestMemory, flags: int, at: int) -> None:
    """At the head and behind a normal descriptor; what it points at is not read."""
    table = [*[(0, 16, NEXT, 1)] * at, (0x1000, 16, flags, 0)]
    text = refusal(memory, table)
    assert text == f"descriptor {at} is indirect, which was not negotiated (2.7.5.3.1)"


def test_an_empty_descriptor_is_left_out(memory: GuestMemory) -> None:
    """Wherever it points: it covers no byte (CVE-2023-5158)."""
    table = [
        ((1 << 64) - 1, 0, NEXT, 1),
        (0x100, 16, NEXT, 2),
        (LOW, 0, NEXT, 3),
        (0, 0, NEXT | WRITE, 4),
        (0x200, 8, NEXT | WRITE, 5),
        (HIGH - 1, 0, WRITE, 0),
    ]
    chain = walk(memory, table)
    assert isinstance(chain, Chain)
    assert chain.readable == ((0x100, 16),)
    assert chain.writable == ((0x200, 8),)


def test_a_chain_of_nothing_is_a_chain(memory: GuestMemory) -> None:
    chain = walk(memory, [(0, 0, 0, 0)])
    assert isinstance(chain, Chain)
    assert (chain.readable, chain.writable, chain.read(100)) == ((), (), b"")


def test_flags_without_a_meaning_are_ignored(memory: GuestMemory) -> None:
    chain = walk(memory, [(0x100, 16, 0xFFF8, 7), (0, 0, 0, 0)])
    assert isinstance(chain, Chain)
    assert chain.readable == ((0x100, 16),)


class AllOfTheWorld(GuestMemory):
    """Every address is inside, so that only the sum of lengths can be wrong."""

    def __init__(self) -> None:
        super().__init__([])

    def contains(self, gpa: Gpa, length: int) -> bool:
        return True


@pytest.mark.parametrize(("last", "fits"), [(1 << 30, True), ((1 << 30) + 1, False)])
def test_a_chain_has_at_most_4_gib(last: int, fits: bool) -> None:
    """Clause 2.7.5.2: longer than 2^32 bytes in total is refused, 2^32 itself is not."""
    quarter = 1 << 30
    table = [(0, quarter, NEXT, 1), (0, quarter, NEXT, 2), (0, quarter, NEXT | WRITE, 3), (0, last, WRITE, 0)]
    item = walk(AllOfTheWorld(), table)
    if fits:
        assert isinstance(item, Chain)
        assert item.readable_len + item.writable_len == 1 << 32
    else:
        assert isinstance(item, BadChain)
        assert str(item.error) == "the chain is longer than 2^32 bytes at descriptor 3 (2.7.5.2)"


# Numbers that lie near a border, so that borders are met in most examples.
addresses = st.one_of(
    st.sampled_from([0, LOW, HIGH, HIGH + LOW, 1 << 64]).flatmap(
        lambda edge: st.integers(max(0, edge - 20), min(edge + 20, (1 << 64) - 1))
    ),
    st.integers(0, (1 << 64) - 1),
)
lengths = st.one_of(st.integers(0, 24), st.just(LOW), st.integers(0, 0xFFFF_FFFF))
flag_words = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE]), st.integers(0, 15))


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    following = st.integers(0, size - 1) | st.integers(0, size)
    return [(draw(addresses), draw(lengths), draw(flag_words), draw(following)) for _ in range(size)]


@st.composite
def nearly_good_tables(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Chains that are good but for at most one field."""
    size = draw(st.sampled_from([2, 4, 8]))
    writable_from = draw(st.integers(0, size))
    table = [
        (
            draw(st.sampled_from([0, HIGH])) + draw(st.integers(0, 1000)),
            draw(st.integers(0, 100)),
            (NEXT if index + 1 < size else 0) | (WRITE if index >= writable_from else 0),
            (index + 1) % size,
        )
        for index in range(size)
    ]
    if draw(st.booleans()):
        at, field = draw(st.integers(0, size - 1)), draw(st.integers(0, 3))
        spoiled = list(table[at])
        spoiled[field] = draw((addresses, lengths, flag_words, st.integers(0, size))[field])
        table[at] = (spoiled[0], spoiled[1], spoiled[2], spoiled[3])
    return table


@given(table=tables() | nearly_good_tables(), data=st.data())
@example(table=[(0, 0, NEXT, 0)], data=None)
def test_the_walk_agrees_with_the_naive_one(table: Table, data: st.DataObject | None) -> None:
    head = 0 if data is None else data.draw(st.integers(0, len(table) - 1))
    with open_ram(2 << 20) as ram:
        item = walk(split_memory(ram), table, head)
    expected = naive_walk(table, head)
    if expected is None:
        assert isinstance(item, BadChain)
    else:
        assert isinstance(item, Chain)
        assert (list(item.readable), list(item.writable)) == expected
    assert item.head == head


def make_chain(memory: GuestMemory, readable: Sequence[int], writable: Sequence[int]) -> Chain:
    """Return a chain of segments of these lengths, each with a gap of 8 bytes behind it."""
    at = BUFFERS
    segments = []
    for length in (*readable, *writable):
        segments.append(Segment(at, length))
        at = Gpa(at + length + 8)
    return Chain(0, tuple(segments[: len(readable)]), tuple(segments[len(readable) :]), memory)


@given(lengths=st.lists(st.integers(1, 20), max_size=5), limit=st.integers(-2, 110))
def test_read_gathers_up_to_its_limit(lengths: list[int], limit: int) -> None:
    with open_ram(2 << 20) as ram:
        memory = split_memory(ram)
        chain = make_chain(memory, lengths, [])
        expected = b""
        for number, (gpa, length) in enumerate(chain.readable, 1):
            memory.write(gpa, bytes([number]) * length)
            expected += bytes([number]) * length
        assert chain.read(limit) == expected[: max(0, limit)]


@given(lengths=st.lists(st.integers(1, 20), max_size=5), size=st.integers(0, 110))
def test_write_fills_from_the_start_and_nothing_else(lengths: list[int], size: int) -> None:
    """The bytes between the segments, and those behind the data, stay as they were."""
    with open_ram(2 << 20) as ram:
        memory = split_memory(ram)
        ram.buffer[:LOW] = b"\xee" * LOW
        chain = make_chain(memory, [8], lengths)
        data = bytes(n % 200 + 1 for n in range(size))
        expected = bytearray(ram.buffer[:LOW])
        if size > sum(lengths):
            with pytest.raises(RingError, match="do not fit"):
                chain.write(data)
        else:
            places = [gpa + n for gpa, length in chain.writable for n in range(length)]
            for place, byte in zip(places, data, strict=False):
                expected[place] = byte
            assert chain.write(data) == size
        assert ram.buffer[:LOW] == expected


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_write_takes_any_kind_of_bytes(memory: GuestMemory, kind: type) -> None:
    chain = make_chain(memory, [], [2, 3])
    assert chain.write(kind(b"abcde")) == 5
    assert [memory.read(*segment) for segment in chain.writable] == [b"ab", b"cde"]


def test_what_was_read_is_a_copy(memory: GuestMemory) -> None:
    chain = make_chain(memory, [4], [])
    memory.write(BUFFERS, b"good")
    data = chain.read(4)
    memory.write(BUFFERS, b"evil")
    assert data == b"good"
