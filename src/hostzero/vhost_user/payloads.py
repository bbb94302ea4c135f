# SPDX-License-Identifier: GPL-2.0-only
"""What vhost-user messages carry: each payload as bytes, and every limit on its values.

Both ends use this module, so each payload packs what it parses; numbers are in the machine's byte
order. A payload has exactly the size that its type prescribes. One that has not is refused, and so is
one with values that cannot be, or that ask for what is not offered. What depends on a session's
state, its descriptors or its memory is checked by whoever has them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

from hostzero.errors import MessageError
from hostzero.vhost_user.protocol import ErrorKind

REGIONS_MAX: Final = 8
"""Memory regions in one table without CONFIGURE_MEM_SLOTS."""
CONFIG_SIZE_MAX: Final = 256
"""Bytes of configuration space in one message (`VHOST_USER_MAX_CONFIG_SIZE`)."""
NOFD: Final = 1 << 8
"""In the number of a KICK, CALL or ERR message: no descriptor comes with it."""

_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDR: Final = struct.Struct("=IIQQQQ")
_REGION: Final = struct.Struct("=QQQQ")
_TABLE: Final = struct.Struct("=II")
_CONFIG: Final = struct.Struct("=III")

_U64_MAX: Final = (1 << 64) - 1


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
