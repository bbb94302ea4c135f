# SPDX-License-Identifier: GPL-2.0-only
"""Where a split virtqueue lies in guest memory, and the shape of its entries.

A ring has three parts (virtio 1.3, 2.7): the descriptor table, the available ring, which only
the driver writes, and the used ring, which only the device writes. All fields are little
endian (virtio 1.3, 1.4); the legacy interface is not served.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa

QUEUE_SIZE_MAX: Final = 32768
"""The largest ring: a 16-bit index must tell full from empty (virtio 1.3, 2.7.13)."""

CHAIN_BYTES_MAX: Final = 1 << 32
"""The most bytes in one chain (virtio 1.3, 2.7.5.2)."""

VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1

DESC: Final = struct.Struct("<QIHH")
"""`struct virtq_desc`: addr, len, flags, next; 16 bytes."""

USED_ELEM: Final = struct.Struct("<II")
"""`struct virtq_used_elem`: id, len; 8 bytes."""

# Offsets within a part, in bytes: flags, then idx, then the entries, then the event index.
RING_HEADER: Final = 4
AVAIL_ENTRY: Final = 2

_DESC_ALIGN: Final = 16
_AVAIL_ALIGN: Final = 2
_USED_ALIGN: Final = 4


class Segment(NamedTuple):
    """One run of guest bytes in a request: an address and a length in bytes."""

    gpa: Gpa
    length: int


def ring_bytes(size: int) -> tuple[int, int, int]:
    """Return the bytes of the descriptor table, the available ring and the used ring.

    The event index at the end of either ring is counted whether it is negotiated or not, as
    in the table of virtio 1.3, 2.7.

    Raises:
        RingError: `size` is not a power of two from 1 to 32768.
    """
    _check_size(size)
    return DESC.size * size, 6 + AVAIL_ENTRY * size, 6 + USED_ELEM.size * size


def contiguous_bytes(size: int) -> int:
    """Return the bytes that `RingLayout.contiguous` needs for a ring of `size` entries."""
    return sum(_contiguous_parts(size))


@dataclass(frozen=True, slots=True, init=False)
class RingLayout:
    """The size and the addresses of one ring, all of it known to lie in guest memory.

    Attributes:
        size: entries, a power of two.
        desc: the first byte of the descriptor table (kernel: `vring.desc`).
        avail: the first byte of the available ring.
        used: the first byte of the used ring.
    """

    size: int
    desc: Gpa
    avail: Gpa
    used: Gpa

    def __init__(self) -> None:
        """Refuse: a layout that was not checked must not exist, so `validated` makes them."""
        raise TypeError("a RingLayout comes from RingLayout.validated()")

    @classmethod
    def validated(cls, memory: GuestMemory, size: int, desc: int, avail: int, used: int) -> RingLayout:
        """Return a layout after checking numbers that a driver chose.

        Raises:
            RingError: the size is not a power of two up to 32768; a part is not aligned to
                16, 2 and 4 bytes in that order (virtio 1.3, 2.7.1); a part lies outside guest
                memory; or two parts overlap, so that one end would write the other's part.
        """
        parts = list(
            zip(
                ("descriptor table", "available ring", "used ring"),
                (desc, avail, used),
                ring_bytes(size),
                (_DESC_ALIGN, _AVAIL_ALIGN, _USED_ALIGN),
                strict=True,
            )
        )
        for name, gpa, length, align in parts:
            if gpa < 0 or gpa % align:
                raise RingError(f"the {name} at {gpa:#x} is not aligned to {align} bytes (virtio 1.3, 2.7.1)")
            if not memory.contains(Gpa(gpa), length):
                raise RingError(f"the {name}, {length} bytes at {gpa:#x}, is not all in guest memory")
        in_order = sorted(parts, key=lambda part: part[1])
        for (name, gpa, length, _), (above, above_gpa, _, _) in itertools.pairwise(in_order):
            if gpa + length > above_gpa:
                raise RingError(f"the {name} at {gpa:#x} runs into the {above} at {above_gpa:#x}")
        layout = object.__new__(cls)
        for field, value in (("size", size), ("desc", desc), ("avail", avail), ("used", used)):
            object.__setattr__(layout, field, value)
        return layout

    @classmethod
    def contiguous(cls, memory: GuestMemory, size: int, base: Gpa) -> RingLayout:
        """Return a layout with the three parts one after the other from `base`.

        `base` needs an alignment of 16 bytes and `contiguous_bytes(size)` bytes of room.

        Raises:
            RingError: as `validated`.
        """
        desc_bytes, avail_bytes, _ = _contiguous_parts(size)
        return cls.validated(memory, size, base, base + desc_bytes, base + desc_bytes + avail_bytes)


def need_event(event: int, new: int, old: int) -> bool:
    """Return whether moving an index from `old` to `new` passed the entry that `event` names.

    All three are 16 bits wide and wrap. The other end wants to be told when the entry with
    index `event` is written: that is when the index goes from `event` to `event + 1` (virtio
    1.3, 2.7.7.2 and 2.7.10.1; kernel: `vring_need_event`).
    """
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


def _check_size(size: int) -> None:
    if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
        raise RingError(
            f"a queue size of {size} is not a power of two from 1 to {QUEUE_SIZE_MAX} (virtio 1.3, 2.7)"
        )


def _contiguous_parts(size: int) -> tuple[int, int, int]:
    desc_bytes, avail_bytes, used_bytes = ring_bytes(size)
    # The descriptor table keeps 16-byte alignment by itself; the available ring may end two
    # bytes off the alignment of the used ring.
    return desc_bytes, -(-avail_bytes // _USED_ALIGN) * _USED_ALIGN, used_bytes
