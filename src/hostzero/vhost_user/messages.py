# SPDX-License-Identifier: GPL-2.0-only
"""vhost-user messages: the header in front of each, and which payload and descriptors follow it.

Both ends use this module. Nothing here touches a socket or a descriptor; the header's numbers are
in the machine's byte order.

===========  ==================================================================================
field        meaning
===========  ==================================================================================
request      `Request` from the front end, `BackendRequest` on the backend channel
flags        bits 0 and 1: the version, 1; bit 2: a reply; bit 3: a reply is wanted (REPLY_ACK)
size         bytes of payload, at most `PAYLOAD_MAX`
===========  ==================================================================================

A payload that is not what its request prescribes is refused; its bytes were read, so the next
message is found all the same. A header of another version, a reply where a request is due, or a
size above `PAYLOAD_MAX` ends the connection: where the next message begins is then not known.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    MemTable,
    Payload,
    VringAddr,
    VringFd,
    VringState,
)
from hostzero.vhost_user.protocol import ErrorKind, Request, name_of

VERSION: Final = 1
VERSION_MASK: Final = 3
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

PAYLOAD_MAX: Final = 4096
"""The largest payload that is read; the largest that any request here needs has 268 bytes."""
FDS_MAX: Final = 8
"""Descriptors with one message (`VHOST_MEMORY_BASELINE_NREGIONS`)."""

HEADER: Final = struct.Struct("=III")
"""request, flags, size."""


class Header(NamedTuple):
    """The twelve bytes in front of every payload."""

    request: int
    flags: int
    size: int

    def pack(self) -> bytes:
        """Return the header as bytes."""
        return HEADER.pack(*self)

    @classmethod
    def parse(cls, data: bytes, *, reply: bool) -> Header:
        """Return a checked header; `reply` says which of the two is due.

        Raises:
            ConnectionLost: another version, a reply for a request or the reverse, or a payload
                above `PAYLOAD_MAX`: the stream cannot be followed any further.
        """
        header = cls(*HEADER.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise ConnectionLost(
                f"message {name_of(header.request)} has version {header.flags & VERSION_MASK}, not {VERSION}"
            )
        if bool(header.flags & FLAG_REPLY) != reply:
            what, due = ("request", "reply") if reply else ("reply", "request")
            raise ConnectionLost(f"message {name_of(header.request)} is a {what} where a {due} is due")
        if header.size > PAYLOAD_MAX:
            raise ConnectionLost(
                f"message {name_of(header.request)} has {header.size} bytes of payload, "
                f"more than {PAYLOAD_MAX}"
            )
        return header

    @property
    def need_reply(self) -> bool:
        """Whether an acknowledgement is wanted (REPLY_ACK)."""
        return bool(self.flags & FLAG_NEED_REPLY)


REQUEST_PAYLOADS: Final[dict[Request, type[Payload]]] = {
    Request.GET_FEATURES: Empty,
    Request.SET_FEATURES: U64,
    Request.SET_OWNER: Empty,
    Request.RESET_OWNER: Empty,
    Request.SET_MEM_TABLE: MemTable,
    Request.SET_VRING_NUM: VringState,
    Request.SET_VRING_ADDR: VringAddr,
    Request.SET_VRING_BASE: VringState,
    Request.GET_VRING_BASE: VringState,
    Request.SET_VRING_KICK: VringFd,
    Request.SET_VRING_CALL: VringFd,
    Request.SET_VRING_ERR: VringFd,
    Request.GET_PROTOCOL_FEATURES: Empty,
    Request.SET_PROTOCOL_FEATURES: U64,
    Request.GET_QUEUE_NUM: Empty,
    Request.SET_VRING_ENABLE: VringState,
    Request.SET_BACKEND_REQ_FD: Empty,
    Request.GET_CONFIG: Config,
    Request.SET_CONFIG: Config,
    Request.RESET_DEVICE: Empty,
}
"""What each request carries; one that is not here is not served."""

REPLY_PAYLOADS: Final[dict[Request, type[Payload]]] = {
    Request.GET_FEATURES: U64,
    Request.GET_VRING_BASE: VringState,
    Request.GET_PROTOCOL_FEATURES: U64,
    Request.GET_QUEUE_NUM: U64,
    Request.GET_CONFIG: Config,
}
"""What comes back for the requests that ask; any other is answered by a `U64`, and only if that
was wanted."""


def parse_request(header: Header, data: bytes, fds: int) -> Payload:
    """Return the payload of a request that has come with `fds` descriptors.

    Raises:
        MessageError: the request is not served, its payload is malformed, or the number of
            descriptors is not the one that it has to have.
    """
    kind = _PAYLOADS.get(header.request)
    if kind is None:
        raise MessageError(ErrorKind.UNKNOWN, f"request {name_of(header.request)} is not served here")
    payload = kind.parse(data)
    wanted = fds_of(header.request, payload)
    if fds != wanted:
        raise MessageError(ErrorKind.DESCRIPTORS, f"{fds} descriptors came and not {wanted}")
    return payload


def fds_of(request: int, payload: Payload) -> int:
    """Return how many descriptors come with a request."""
    if isinstance(payload, MemTable):
        return len(payload.regions)
    if isinstance(payload, VringFd):
        return int(payload.has_fd)
    return int(request == Request.SET_BACKEND_REQ_FD)


_PAYLOADS: Final[dict[int, type[Payload]]] = {
    int(request): kind for request, kind in REQUEST_PAYLOADS.items()
}
