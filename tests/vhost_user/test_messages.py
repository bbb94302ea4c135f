# SPDX-License-Identifier: GPL-2.0-only
"""Headers, and what each request has to carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.messages import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    PAYLOAD_MAX,
    REPLY_PAYLOADS,
    REQUEST_PAYLOADS,
    Header,
    fds_of,
    parse_request,
)
from hostzero.vhost_user.payloads import MemTable, Region
from hostzero.vhost_user.protocol import ErrorKind, Request

REGION = Region(0, 4096, 0x1000, 0)


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


def test_every_request_that_is_served_has_a_payload_and_the_others_are_refused() -> None:
    unserved = set(Request) - set(REQUEST_PAYLOADS)
    assert unserved == {Request.SET_LOG_BASE, Request.SET_LOG_FD}
    assert set(REPLY_PAYLOADS) < set(REQUEST_PAYLOADS)
    for number in (*unserved, 0, 99):
        with pytest.raises(MessageError, match="is not served") as caught:
            parse_request(Header(number, 1, 0), b"", 0)
        assert caught.value.kind == ErrorKind.UNKNOWN


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
