# SPDX-License-Identifier: GPL-2.0-only
"""Bytes of payloads: known ones, every limit, and that what is packed is what is parsed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import MessageError
from hostzero.vhost_user.payloads import (
    CONFIG_SIZE_MAX,
    U64,
    Config,
    Empty,
    MemTable,
    Payload,
    Region,
    VringAddr,
    VringFd,
    VringState,
)

U32 = st.integers(0, (1 << 32) - 1)
U64S = st.integers(0, (1 << 64) - 1)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    size = draw(st.integers(1, (1 << 64) - 1))
    start = st.integers(0, (1 << 64) - size)
    return Region(draw(start), size, draw(start), draw(start))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    data = draw(st.binary(min_size=1, max_size=CONFIG_SIZE_MAX))
    return Config(draw(st.integers(0, CONFIG_SIZE_MAX - len(data))), draw(U32), data)


PAYLOADS = st.one_of(
    st.just(Empty()),
    st.builds(U64, U64S),
    st.builds(VringFd, st.integers(0, 255), st.booleans()),
    st.builds(VringState, U32, U32),
    st.builds(VringAddr, U32, st.just(0), U64S, U64S, U64S, U64S),
    st.builds(MemTable, st.lists(regions(), min_size=1, max_size=8).map(tuple)),
    configs(),
)


@given(PAYLOADS)
def test_what_is_packed_is_what_is_parsed(payload: Payload) -> None:
    assert type(payload).parse(payload.pack()) == payload


@pytest.mark.parametrize(
    ("payload", "data"),
    [
        (U64(0x0102030405060708), bytes.fromhex("0807060504030201")),
        (VringFd(3), bytes.fromhex("0300000000000000")),
        (VringFd(3, has_fd=False), bytes.fromhex("0301000000000000")),
        (VringState(2, 128), bytes.fromhex("0200000080000000")),
        (VringAddr(1, 0, 2, 3, 4, 5), struct.pack("<IIQQQQ", 1, 0, 2, 3, 4, 5)),
        (MemTable((Region(1, 2, 3, 4),)), struct.pack("<IIQQQQ", 1, 0, 1, 2, 3, 4)),
        (Config(4, 0, b"abcd"), struct.pack("<III", 4, 4, 0) + b"abcd"),
    ],
)
def test_the_bytes_are_those_of_the_specification(payload: Payload, data: bytes) -> None:
    """Written out for a little-endian machine; the order of a ring's fields is desc, used, avail."""
    assert payload.pack() == data
    assert type(payload).parse(data) == payload


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (b"", "has no count"),
        (struct.pack("=II", 0, 0), "0 regions"),
        (struct.pack("=II", 9, 0) + bytes(9 * 32), "9 regions"),
        (struct.pack("=II", 0xFFFF_FFFF, 0), "4294967295 regions"),
        (struct.pack("=II", 2, 0) + bytes(32), "40 bytes that has to have 72"),
        (struct.pack("=II4Q", 1, 0, 0, 0, 0, 0), "is empty"),
        (struct.pack("=II4Q", 1, 0, (1 << 64) - 1, 2, 0, 0), "end of the guest"),
        (struct.pack("=II4Q", 1, 0, 0, 2, (1 << 64) - 1, 0), "end of the front end's"),
        (struct.pack("=II4Q", 1, 0, 0, 2, 0, (1 << 64) - 1), "end of the file's"),
    ],
)
def test_memory_tables_that_cannot_be(table: bytes, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        MemTable.parse(table)


def test_a_region_may_end_with_its_space() -> None:
    whole = Region((1 << 64) - 4096, 4096, 0, 0)
    assert MemTable.parse(MemTable((whole,)).pack()).regions == (whole,)
