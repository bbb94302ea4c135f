# SPDX-License-Identifier: GPL-2.0-only
"""One request as the device sees it, after every descriptor was checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.ring_layout import (
    CHAIN_BYTES_MAX,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    Segment,
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A checked descriptor chain: every segment is in guest memory, the readable ones first.

    The addresses and lengths are copies and cannot change any more; the bytes that they name
    belong to the guest and can.

    Attributes:
        head: the descriptor that `DeviceQueue.push` takes.
        readable: what the device may read, in order; no segment is empty.
        writable: what the device may write, in order; no segment is empty.
    """

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]
    memory: GuestMemory = field(repr=False, compare=False)

    @property
    def readable_len(self) -> int:
        """Bytes that the device may read."""
        return sum(length for _, length in self.readable)

    @property
    def writable_len(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length in self.writable)

    def read(self, limit: int) -> bytes:
        """Return the first bytes of the readable segments, `limit` of them or all there are.

        The bytes are a copy: check the copy, and the guest cannot change it afterwards.
        """
        parts: list[bytes] = []
        left = limit
        for gpa, length in self.readable:
            if left <= 0:
                break
            parts.append(bytes(self.memory.read(gpa, min(length, left))))
            left -= length
        return b"".join(parts)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Fill the writable segments from their start with `data`; return its length in bytes.

        Raises:
            RingError: `data` is longer than the writable segments; nothing was written.
        """
        if len(data) > self.writable_len:
            raise RingError(
                f"{len(data)} bytes do not fit the {self.writable_len} writable bytes of chain {self.head}"
            )
        done = 0
        for gpa, length in self.writable:
            if done >= len(data):
                break
            part = bytes(data[done : done + length])
            self.memory.write(gpa, part)
            done += len(part)
        return done


@dataclass(frozen=True, slots=True)
class BadChain:
    """A chain that broke a rule; nothing of it was touched.

    Attributes:
        head: to be pushed with a used length of 0, so that the driver gets its buffer back.
        error: the rule.
    """

    head: int
    error: RingError


def walk_chain(
    memory: GuestMemory, size: int, head: int, read_descriptor: Callable[[int], tuple[int, int, int, int]]
) -> Chain | BadChain:
    """Follow a chain from `head` and check each descriptor against virtio 1.3, 2.7.5.

    `head` is below `size`, the entries of the table. `read_descriptor` returns addr, len,
    flags and next of one entry, and is called once for each descriptor.

    A descriptor of length zero is tolerated and its segment left out (CVE-2023-5158 is the
    kernel's vringh looping on one): it covers no byte, so its address does not matter, but
    its flags count like any other's. Flags that virtio 1.3 does not define are ignored.
    """
    readable: list[Segment] = []
    writable: list[Segment] = []
    written = False
    total = 0
    index = head
    for _ in range(size):
        addr, length, flags, following = read_descriptor(index)
        if flags & VIRTQ_DESC_F_INDIRECT:
            # 2.7.5.3.1: not unless VIRTIO_F_INDIRECT_DESC was negotiated, and here it never is:
            # the kernel's driver clears it (patch 28 of the series).
            return _bad(head, f"descriptor {index} is indirect, which was not negotiated (2.7.5.3.1)")
        if flags & VIRTQ_DESC_F_WRITE:
            written = True
        elif written:
            return _bad(head, f"descriptor {index} is device-readable after a device-writable one (2.7.4.2)")
        total += length
        if total > CHAIN_BYTES_MAX:
            return _bad(head, f"the chain is longer than 2^32 bytes at descriptor {index} (2.7.5.2)")
        if length:
            gpa = Gpa(addr)
            if not memory.contains(gpa, length):
                return _bad(
                    head, f"descriptor {index}, {length} bytes at {addr:#x}, is not all in guest memory"
                )
            (writable if written else readable).append(Segment(gpa, length))
        if not flags & VIRTQ_DESC_F_NEXT:
            return Chain(head, tuple(readable), tuple(writable), memory)
        if following >= size:
            return _bad(head, f"descriptor {index} goes on to {following} on a ring of {size}")
        index = following
    # The queue size is the longest chain (2.7.5); a longer one visits a descriptor twice.
    return _bad(head, f"the chain has more than {size} descriptors: it loops (2.7.5)")


def _bad(head: int, reason: str) -> BadChain:
    return BadChain(head, RingError(reason))
