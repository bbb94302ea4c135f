# SPDX-License-Identifier: GPL-2.0-only
"""Bytes of messages: known ones, every limit, and that what is packed is what is parsed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.messages import (
    CONFIG_SIZE_MAX,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    PAYLOAD_MAX,
    REPLY_PAYLOADS,
    REQUEST_PAYLOADS,
    U64,
    Config,
    Empty,
    ErrorKind,
    Header,
    MemTable,
    Payload,
    Region,
    Request,
    VringAddr,
    VringFd,
    VringState,
    fds_of,
    name_of,
    parse_request,
)

U32 = st.integers(0, (1 << 32) - 1)
U64S = st.integers(0, (1 << 64) - 1)
REGION = Region(0, 4096, 0x1000, 0)


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


@given(st.sampled_from(list(Request)), st.binary(max_size=PAYLOAD_MAX), st.integers(0, 9))
def test_any_bytes_are_parsed_or_refused(request_: Request, data: bytes, fds: int) -> None:
    header = Header(request_, 1, len(data))
    kind = ""
    try:
        payload = parse_request(header, data, fds)
    except MessageError as error:
        kind = error.kind
    else:
        assert fds_of(request_, payload) == fds
        assert len(payload.pack()) == len(data)
    assert kind in {"", ErrorKind.MALFORMED, ErrorKind.DESCRIPTORS, ErrorKind.UNKNOWN}


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


def test_every_request_that_is_served_has_a_payload_and_the_others_are_refused() -> None:
    unserved = set(Request) - set(REQUEST_PAYLOADS)
    assert unserved == {Request.SET_LOG_BASE, Request.SET_LOG_FD}
    assert set(REPLY_PAYLOADS) < set(REQUEST_PAYLOADS)
    for number in (*unserved, 0, 99):
        with pytest.raises(MessageError, match="is not served") as caught:
            parse_request(Header(number, 1, 0), b"", 0)
        assert caught.value.kind == ErrorKind.UNKNOWN


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


def test_as_many_descriptors_as_regions() -> None:
    table = MemTable((REGION, REGION))
    header = Header(Request.SET_MEM_TABLE, 1, 72)
    assert parse_request(header, table.pack(), 2) == table
    with pytest.raises(MessageError, match="1 descriptors came and not 2"):
        parse_request(header, table.pack(), 1)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_header_of_another_version_ends_the_connection(version: int) -> None:
    with pytest.raises(ConnectionLost, match=f"version {version}"):
        Header.parse(Header(1, version, 0).pack(), reply=False)


def test_a_reply_where_a_request_is_due_and_the_reverse_end_the_connection() -> None:
    with pytest.raises(ConnectionLost, match=r"GET_FEATURES \(1\) is a reply where a request is due"):
        Header.parse(Header(1, 1 | FLAG_REPLY, 0).pack(), reply=False)
    with pytest.raises(ConnectionLost, match="is a request where a reply is due"):
        Header.parse(Header(1, 1, 0).pack(), reply=True)


def test_a_payload_above_the_limit_ends_the_connection() -> None:
    assert Header.parse(Header(1, 1, PAYLOAD_MAX).pack(), reply=False).size == PAYLOAD_MAX
    with pytest.raises(ConnectionLost, match="more than 4096"):
        Header.parse(Header(1, 1, PAYLOAD_MAX + 1).pack(), reply=False)


def test_the_flag_that_wants_an_acknowledgement() -> None:
    assert Header.parse(Header(1, 1 | FLAG_NEED_REPLY, 0).pack(), reply=False).need_reply
    assert not Header.parse(Header(1, 1, 0).pack(), reply=False).need_reply


def test_names_of_requests() -> None:
    assert name_of(5) == "SET_MEM_TABLE (5)"
    assert name_of(77) == "77"
