# SPDX-License-Identifier: GPL-2.0-only
"""The bytes that travel inside balloon requests, and the configuration space.

Everything is little endian (virtio 1.3, 5.5, VERSION_1). The zero bitmap of bit 7 is indexed by
the position of a PFN in its own request, never by the PFN's value, and its bits are counted
from the least significant bit of the first byte.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hostzero.errors import VirtioError

VIRTIO_ID_BALLOON: Final = 5
VIRTIO_BALLOON_PFN_SHIFT: Final = 12
"""The balloon counts pages of 4 KiB whatever the guest's page size (virtio 1.3, 5.5.6)."""

ARRAY_PFNS_MAX: Final = 256
"""PFNs in one request of Linux (kernel: `VIRTIO_BALLOON_ARRAY_PFNS_MAX`)."""

CMD_ID_STOP: Final = 0
"""`VIRTIO_BALLOON_CMD_ID_STOP`: no free page hinting wanted."""
CMD_ID_DONE: Final = 1
"""`VIRTIO_BALLOON_CMD_ID_DONE`: the hinted pages may go back to the guest."""
CMD_ID_MIN: Final = 0x80000000
"""The first command id that a hinting run of QEMU has; the driver takes any id above DONE."""

CONFIG: Final = struct.Struct("<IIII")
"""`struct virtio_balloon_config`: num_pages, actual, free_page_hint_cmd_id, poison_val."""

CONFIG_NUM_PAGES: Final = 0
CONFIG_ACTUAL: Final = 4
CONFIG_FREE_PAGE_HINT_CMD_ID: Final = 8
CONFIG_POISON_VAL: Final = 12

STAT_ENTRY: Final = struct.Struct("<HQ")
"""`struct virtio_balloon_stat`: tag, val; packed, 10 bytes."""

_PFN: Final = np.dtype("<u4")


class BalloonConfig(NamedTuple):
    """The configuration space, 16 bytes (virtio 1.3, 5.5.4). Pages are of 4 KiB."""

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = CMD_ID_STOP
    poison_val: int = 0

    def pack(self) -> bytes:
        """Return the 16 bytes of the configuration space."""
        return CONFIG.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> BalloonConfig:
        """Return the fields of a configuration space.

        Raises:
            VirtioError: `data` is not 16 bytes.
        """
        if len(data) != CONFIG.size:
            raise VirtioError(f"a balloon configuration space has {CONFIG.size} bytes, not {len(data)}")
        return cls(*CONFIG.unpack(data))


class StatTag(enum.IntEnum):
    """What one statistics entry counts (kernel: `VIRTIO_BALLOON_S_*`)."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJFLT = 2
    MINFLT = 3
    MEMFREE = 4
    MEMTOT = 5
    AVAIL = 6
    CACHES = 7
    HTLB_PGALLOC = 8
    HTLB_PGFAIL = 9
    OOM_KILL = 10
    ALLOC_STALL = 11
    ASYNC_SCAN = 12
    DIRECT_SCAN = 13
    ASYNC_RECLAIM = 14
    DIRECT_RECLAIM = 15


VIRTIO_BALLOON_S_NR: Final = len(StatTag)


def pack_stats(stats: Iterable[tuple[int, int]]) -> bytes:
    """Return statistics as 10-byte entries; values wrap to 64 bits as in the kernel."""
    return b"".join(STAT_ENTRY.pack(tag, value & 0xFFFF_FFFF_FFFF_FFFF) for tag, value in stats)


def unpack_stats(data: bytes) -> list[tuple[int, int]]:
    """Return the (tag, value) entries of a statistics buffer, in its order, doubles included.

    Tags are returned as they came: which of them are known is for the device to say. A last
    entry that is cut short is dropped, as QEMU does. Virtio 1.3, 5.5.6.3.1 asks for a length
    that is a multiple of 6; Linux does not keep that with its 10-byte entries, so it is not
    checked here.
    """
    whole = len(data) - len(data) % STAT_ENTRY.size
    return list(STAT_ENTRY.iter_unpack(data[:whole]))


def pack_pfns(pfns: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Return PFNs (4 KiB units) as an array of le32.

    Raises:
        VirtioError: a PFN is negative or does not fit into 32 bits, so that the wire would
            carry another page's number.
    """
    wide = np.asarray(pfns, dtype=np.int64)
    if wide.size and (int(wide.min()) < 0 or int(wide.max()) > 0xFFFF_FFFF):
        raise VirtioError(f"a PFN is outside 32 bits: the array spans {wide.min()} to {wide.max()}")
    return wide.astype(_PFN).tobytes()


def unpack_pfns(data: bytes) -> NDArray[np.int64]:
    """Return the PFNs (4 KiB units) of a request's device-readable bytes.

    Raises:
        VirtioError: the length is not a multiple of 4.
    """
    if len(data) % _PFN.itemsize:
        raise VirtioError(f"a PFN array of {len(data)} bytes is not a whole number of 4-byte PFNs")
    return np.frombuffer(data, dtype=_PFN).astype(np.int64)


def bitmap_bytes(count: int) -> int:
    """Return the bytes of a bitmap with one bit for each of `count` PFNs."""
    return (count + 7) // 8


def bitmap_set_le(buffer: bytearray | memoryview, n: int) -> None:
    """Set bit `n`, counted from the least significant bit of the first byte (kernel: `set_bit_le`)."""
    buffer[n >> 3] |= 1 << (n & 7)


def bitmap_test_le(buffer: bytes | bytearray | memoryview, n: int) -> bool:
    """Return bit `n`, counted from the least significant bit of the first byte (kernel: `test_bit_le`)."""
    return bool(buffer[n >> 3] >> (n & 7) & 1)


def mask_to_bitmap(mask: ArrayLike) -> bytes:
    """Return one bit for each entry of a boolean array of shape (n,), in `bitmap_bytes(n)` bytes."""
    return np.packbits(np.asarray(mask, dtype=np.bool_), bitorder="little").tobytes()


def bitmap_to_mask(buffer: bytes | bytearray | memoryview, count: int) -> NDArray[np.bool_]:
    """Return the first `count` bits as a boolean array of shape (count,).

    Bits past the end of `buffer` are False: a bit that was not received is no evidence.
    """
    # Padded here: given an empty array and a count, np.unpackbits returns memory that it never
    # wrote, which would be false evidence.
    mask = np.zeros(count, dtype=np.bool_)
    received = np.unpackbits(np.frombuffer(buffer, dtype=np.uint8), bitorder="little")[:count]
    mask[: received.size] = received
    return mask
