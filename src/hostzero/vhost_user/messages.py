# SPDX-License-Identifier: GPL-2.0-only
"""vhost-user messages as bytes: headers, requests, payloads, and every limit on them.

Both ends use this module, so each payload packs what it parses. Nothing here touches a socket
or a descriptor. The source is QEMU's `docs/interop/vhost-user.rst`; numbers are in the
machine's byte order.

===========  ==================================================================================
field        meaning
===========  ==================================================================================
request      `Request` from the front end, `BackendRequest` on the backend channel
flags        bits 0 and 1: the version, 1; bit 2: a reply; bit 3: a reply is wanted (REPLY_ACK)
size         bytes of payload, at most `PAYLOAD_MAX`
===========  ==================================================================================

A payload has exactly the size that its request prescribes. One that has not is refused; its
bytes were read, so the next message is found all the same. A header of another version, a reply
where a request is due, or a size above `PAYLOAD_MAX` ends the connection: where the next
message begins is then not known.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

from hostzero.errors import ConnectionLost, MessageError

F_PROTOCOL_FEATURES: Final = 1 << 30
"""`VHOST_USER_F_PROTOCOL_FEATURES`, among the virtio features; a driver never sees it."""

VERSION: Final = 1
VERSION_MASK: Final = 3
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

PAYLOAD_MAX: Final = 4096
"""The largest payload that is read; the largest that any request here needs has 268 bytes."""
FDS_MAX: Final = 8
"""Descriptors with one message (`VHOST_MEMORY_BASELINE_NREGIONS`)."""
REGIONS_MAX: Final = 8
"""Memory regions in one table without CONFIGURE_MEM_SLOTS."""
CONFIG_SIZE_MAX: Final = 256
"""Bytes of configuration space in one message (`VHOST_USER_MAX_CONFIG_SIZE`)."""
NOFD: Final = 1 << 8
"""In the number of a KICK, CALL or ERR message: no descriptor comes with it."""

HEADER: Final = struct.Struct("=III")
"""request, flags, size."""

_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDR: Final = struct.Struct("=IIQQQQ")
_REGION: Final = struct.Struct("=QQQQ")
_TABLE: Final = struct.Struct("=II")
_CONFIG: Final = struct.Struct("=III")

_U64_MAX: Final = (1 << 64) - 1


class ErrorKind(enum.StrEnum):
    """What can be wrong with a message, to count by."""

    FRAMING = "framing"
    """The connection cannot go on: version, reply bit, size, or an end in the middle."""
    UNKNOWN = "unknown"
    """A request that is not served here."""
    MALFORMED = "malformed"
    """A payload of the wrong size or with values that cannot be."""
    DESCRIPTORS = "descriptors"
    """Too many, too few, or of the wrong type."""
    ORDER = "order"
    """A request that is not due yet, or not any more."""
    FEATURES = "features"
    """Features that were not offered."""
    MEMORY = "memory"
    """A memory table that cannot be mapped, or addresses outside of it."""
    RING = "ring"
    """A ring that cannot run as it was described."""
    INTERNAL = "internal"
    """A defect of hostzero; the log has it."""


class Request(enum.IntEnum):
    """What a front end asks, under the names of the specification."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34


class BackendRequest(enum.IntEnum):
    """What a backend asks over the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(enum.IntFlag):
    """Protocol features by their bits; a backend offers those it implements."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


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


class Payload(Protocol):
    """What follows a header."""

    def pack(self) -> bytes:
        """Return the payload as bytes."""
        ...

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return the payload; MessageError if the bytes are none."""
        ...


class Empty(NamedTuple):
    """No payload."""

    def pack(self) -> bytes:
        """Return no byte."""
        return b""

    @classmethod
    def parse(cls, data: bytes) -> Empty:
        """Take no byte.

        Raises:
            MessageError: there are some.
        """
        _check_size(data, 0)
        return cls()


class U64(NamedTuple):
    """One number: features, a count, or the result of a request (0 is success)."""

    value: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return _U64.pack(self.value)

    @classmethod
    def parse(cls, data: bytes) -> U64:
        """Take 8 bytes.

        Raises:
            MessageError: they are not 8.
        """
        _check_size(data, _U64.size)
        return cls(*_U64.unpack(data))


class VringFd(NamedTuple):
    """The queue to which a descriptor belongs, and whether there is one."""

    queue: int
    has_fd: bool = True

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return U64(self.queue | (0 if self.has_fd else NOFD)).pack()

    @classmethod
    def parse(cls, data: bytes) -> VringFd:
        """Take 8 bytes: bits 0 to 7 the queue, bit 8 set if there is no descriptor.

        Raises:
            MessageError: they are not 8, or a higher bit is set.
        """
        value = U64.parse(data).value
        if value >= NOFD << 1:
            raise MessageError(ErrorKind.MALFORMED, f"{value:#x} names no queue: only bits 0 to 8 may be set")
        return cls(value & 0xFF, not value & NOFD)


class VringState(NamedTuple):
    """A queue and one number: its size, its index, or whether it is enabled."""

    queue: int
    num: int

    def pack(self) -> bytes:
        """Return the 8 bytes."""
        return _STATE.pack(*self)

    @classmethod
    def parse(cls, data: bytes) -> VringState:
        """Take 8 bytes.

        Raises:
            MessageError: they are not 8.
        """
        _check_size(data, _STATE.size)
        return cls(*_STATE.unpack(data))


class VringAddr(NamedTuple):
    """Where a ring lies, in the front end's address space.

    `log` is the address for logging dirty pages and means something only if flag bit 0 is set;
    QEMU leaves a number there without the flag.
    """

    queue: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0

    def pack(self) -> bytes:
        """Return the 40 bytes."""
        return _ADDR.pack(*self)

    @classmethod
    def parse(cls, data: bytes) -> VringAddr:
        """Take 40 bytes.

        Raises:
            MessageError: they are not 40, or ask for logging, which is not offered.
        """
        _check_size(data, _ADDR.size)
        addr = cls(*_ADDR.unpack(data))
        if addr.flags:
            raise MessageError(
                ErrorKind.MALFORMED, f"flags {addr.flags:#x} of SET_VRING_ADDR: logging is not offered"
            )
        return addr


class Region(NamedTuple):
    """One region of guest memory.

    Attributes:
        gpa: its guest physical address.
        size: its bytes.
        user: its address in the front end, by which rings are named.
        mmap_offset: where it begins in the file that comes with it.
    """

    gpa: int
    size: int
    user: int
    mmap_offset: int


class MemTable(NamedTuple):
    """All of guest memory; descriptor n belongs to region n."""

    regions: tuple[Region, ...]

    def pack(self) -> bytes:
        """Return 8 bytes and 32 for each region."""
        parts = [_TABLE.pack(len(self.regions), 0)]
        parts += [_REGION.pack(*region) for region in self.regions]
        return b"".join(parts)

    @classmethod
    def parse(cls, data: bytes) -> MemTable:
        """Take a table whose numbers fit 64-bit address spaces; where it lies is not checked here.

        Raises:
            MessageError: it has no region or more than `REGIONS_MAX`, more or fewer bytes than its
                regions need, or a region that is empty or wraps around the end of a space.
        """
        if len(data) < _TABLE.size:
            raise MessageError(ErrorKind.MALFORMED, f"a memory table of {len(data)} bytes has no count")
        count, _ = _TABLE.unpack_from(data)
        if not 1 <= count <= REGIONS_MAX:
            raise MessageError(
                ErrorKind.MALFORMED, f"a memory table of {count} regions: it has to have 1 to {REGIONS_MAX}"
            )
        _check_size(data, _TABLE.size + count * _REGION.size)
        regions = tuple(Region(*fields) for fields in _REGION.iter_unpack(data[_TABLE.size :]))
        for region in regions:
            _check_region(region)
        return cls(regions)


class Config(NamedTuple):
    """A part of the configuration space; GET_CONFIG asks with as many bytes as it wants back."""

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        """Return 12 bytes and the data."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def parse(cls, data: bytes) -> Config:
        """Take 12 bytes and as many as they announce.

        Raises:
            MessageError: too few bytes, not as many as announced, or a range that is empty or
                not within `CONFIG_SIZE_MAX`.
        """
        if len(data) < _CONFIG.size:
            raise MessageError(ErrorKind.MALFORMED, f"a configuration message of {len(data)} bytes")
        offset, size, flags = _CONFIG.unpack_from(data)
        if not 1 <= size <= CONFIG_SIZE_MAX or offset > CONFIG_SIZE_MAX - size:
            raise MessageError(
                ErrorKind.MALFORMED,
                f"{size} bytes at {offset} are not within {CONFIG_SIZE_MAX} bytes of configuration space",
            )
        _check_size(data, _CONFIG.size + size)
        return cls(offset, flags, data[_CONFIG.size :])


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


def name_of(request: int) -> str:
    """Return a request's name and number, or the number of one that has no name here."""
    return f"{Request(request).name} ({request})" if request in _REQUESTS else str(request)


_REQUESTS: Final[frozenset[int]] = frozenset(Request)
_PAYLOADS: Final[dict[int, type[Payload]]] = {
    int(request): kind for request, kind in REQUEST_PAYLOADS.items()
}


def _check_size(data: Sequence[int], wanted: int) -> None:
    if len(data) != wanted:
        raise MessageError(ErrorKind.MALFORMED, f"a payload of {len(data)} bytes that has to have {wanted}")


def _check_region(region: Region) -> None:
    if not region.size:
        raise MessageError(ErrorKind.MALFORMED, f"the region at {region.gpa:#x} is empty")
    for name, start in (
        ("guest", region.gpa),
        ("front end's", region.user),
        ("file's", region.mmap_offset),
    ):
        if start > _U64_MAX - region.size + 1:
            raise MessageError(
                ErrorKind.MALFORMED,
                f"the region of {region.size:#x} bytes wraps around the end of the {name} space",
            )
