# SPDX-License-Identifier: GPL-2.0-only
"""Malformed chains and rings: each breaks one rule that binds the driver.

The specification says nothing about what a device does with them, so the expectation is what
`Rig.expect_recovery` says: nothing happens to memory that was not named, each head comes back at
most once, the device lives, and a reset makes all well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hostzero.conform.case import add
from hostzero.conform.rig import Rig
from hostzero.conform.rings import RawRing
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT


@dataclass(frozen=True)
class Bad:
    """A started device, and what a bad request is made of.

    Attributes:
        rig: the device.
        ring: the ring that the request goes into.
        gpa: the address of a good buffer of the kind that the queue takes.
        length: its bytes.
    """

    rig: Rig
    ring: RawRing
    gpa: int
    length: int

    @property
    def flags(self) -> int:
        """The direction that the queue's buffers have."""
        return WRITE if self.ring.role is QueueRole.REPORTING else 0

    def give_away(self) -> None:
        """Let the device have the pages of the good buffer."""
        self.rig.ram.may_change(range(self.gpa // PAGE_SIZE, (self.gpa + self.length) // PAGE_SIZE))


Malformed = Callable[[Bad], int | None]
"""Writes a bad request, and returns how many heads a device may give back; None for no telling."""


def loop_of_one(bad: Bad) -> int | None:
    """A descriptor that follows itself."""
    bad.give_away()
    bad.ring.guest.descriptor(0, bad.gpa, bad.length, bad.flags | NEXT, 0)
    bad.ring.guest.offer(0)
    return 1


def loop_of_two(bad: Bad) -> int | None:
    """Two descriptors that follow each other."""
    bad.give_away()
    bad.ring.guest.descriptor(0, bad.gpa, bad.length, bad.flags | NEXT, 1)
    bad.ring.guest.descriptor(1, bad.gpa, bad.length, bad.flags | NEXT, 0)
    bad.ring.guest.offer(0)
    return 1


def next_outside(bad: Bad) -> int | None:
    """A descriptor that goes on outside the table."""
    bad.give_away()
    bad.ring.guest.descriptor(0, bad.gpa, bad.length, bad.flags | NEXT, bad.ring.layout.size)
    bad.ring.guest.offer(0)
    return 1


def address_overflow(bad: Bad) -> int | None:
    """An address whose sum with the length passes 2^64."""
    bad.ring.guest.offer(bad.ring.guest.chain([((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, bad.flags)]))
    return 1


def address_outside(bad: Bad) -> int | None:
    """An address where no RAM is."""
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.rig.ram.nowhere, PAGE_SIZE, bad.flags)]))
    return 1


def over_the_end(bad: Bad) -> int | None:
    """A range that starts in RAM and runs off its end."""
    end = bad.rig.ram.end_of_ram or bad.rig.ram.data.stop
    if bad.ring.role is QueueRole.REPORTING:
        bad.rig.ram.may_change([bad.rig.ram.last_pages(1)])
    bad.ring.guest.offer(bad.ring.guest.chain([(end - PAGE_SIZE, 1 << 31, bad.flags)]))
    return 1


def more_than_4_gib(bad: Bad) -> int | None:
    """A chain of more than 2^32 bytes."""
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.gpa, 0xFFFF_F000, bad.flags)] * 3))
    bad.rig.ram.may_change(range(bad.gpa // PAGE_SIZE, bad.rig.ram.data.stop // PAGE_SIZE))
    return 1


def wrong_order(bad: Bad) -> int | None:
    """A readable descriptor behind a writable one."""
    at = bad.rig.ram.control(64)
    bad.ring.guest.offer(bad.ring.guest.chain([(at, 64, WRITE), (bad.gpa, bad.length, 0)]))
    return 1


def wrong_direction(bad: Bad) -> int | None:
    """A buffer of the other direction than the queue's."""
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.gpa, bad.length, WRITE ^ bad.flags)]))
    return 1


def indirect(bad: Bad) -> int | None:
    """An indirect table, which was not negotiated."""
    table = bad.rig.ram.control(32)
    entry = (
        bad.gpa.to_bytes(8, "little")
        + bad.length.to_bytes(4, "little")
        + bad.flags.to_bytes(2, "little")
        + b"\0\0"
    )
    bad.rig.ram.write(table, entry + entry)
    if bad.ring.role is QueueRole.REPORTING:
        # A device that follows it does what the driver asked for.
        bad.give_away()
    bad.ring.guest.offer(bad.ring.guest.chain([(table, 32, INDIRECT)]))
    return 1


def empty(bad: Bad) -> int | None:
    """A single descriptor of length zero."""
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.gpa, 0, bad.flags)]))
    return 1


def empty_among_others(bad: Bad) -> int | None:
    """Descriptors of length zero before and behind a good one."""
    flags = bad.flags
    bad.give_away()
    bad.ring.guest.offer(
        bad.ring.guest.chain(
            [(bad.gpa, 0, flags), (bad.gpa, bad.length, flags), ((1 << 64) - 1, 0, flags), (0, 0, flags)]
        )
    )
    return 1


def unknown_flags(bad: Bad) -> int | None:
    """Flags that no specification defines."""
    bad.give_away()
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.gpa, bad.length, bad.flags | 0xFF00)]))
    return 1


def whole_table(bad: Bad) -> int | None:
    """A chain as long as the ring, which is allowed."""
    bad.give_away()
    size = bad.ring.layout.size
    bad.ring.guest.offer(bad.ring.guest.chain([(bad.gpa, bad.length, bad.flags)] * size))
    return 1


def head_outside(bad: Bad) -> int | None:
    """An available entry that names a descriptor outside the table."""
    bad.ring.guest.offer(bad.ring.layout.size, 0xFFFF)
    return None


def index_jumps(bad: Bad) -> int | None:
    """An available index that moves by more than the ring holds."""
    bad.give_away()
    bad.ring.guest.chain([(bad.gpa, bad.length, bad.flags)])
    bad.ring.guest.set_avail_idx(bad.ring.layout.size + 1)
    return None


def index_goes_back(bad: Bad) -> int | None:
    """An available index that goes back by one."""
    bad.ring.guest.set_avail_idx(-1)
    return None


KINDS: dict[str, tuple[str, str, Malformed, tuple[int, ...]]] = {
    "loop-of-one": ("A descriptor that follows itself is survived", "2.7.5.2", loop_of_one, ()),
    "loop-of-two": ("Two descriptors that follow each other are survived", "2.7.5.2", loop_of_two, ()),
    "next-outside": ("A chain that leaves the table is survived", "2.7.5", next_outside, ()),
    "address-overflow": (
        "An address that wraps with its length is survived",
        "2.7.5",
        address_overflow,
        (9,),
    ),
    "address-outside": ("A buffer where no RAM is is survived", "2.7.5", address_outside, (9,)),
    "over-the-end": ("A buffer that runs off the end of RAM is survived", "2.7.5", over_the_end, (9,)),
    "more-than-4-gib": ("A chain of more than 2^32 bytes is survived", "2.7.5.2", more_than_4_gib, (9,)),
    "wrong-order": ("A readable part behind a writable one is survived", "2.7.4.2", wrong_order, ()),
    "wrong-direction": ("A buffer of the wrong direction is survived", "2.7.5.1", wrong_direction, (8,)),
    "indirect": ("An indirect table that was not negotiated is survived", "2.7.5.3.1", indirect, ()),
    "empty": ("A buffer of length zero is survived", "2.7.13.1", empty, (8, 12)),
    "empty-among-others": (
        "Descriptors of length zero in a chain are survived",
        "2.7.13.1",
        empty_among_others,
        (12,),
    ),
    "unknown-flags": ("Undefined descriptor flags are survived", "2.7.5", unknown_flags, ()),
    "whole-table": ("A chain of as many descriptors as the ring has is served", "2.7.5", whole_table, ()),
    "head-outside": ("A head outside the table is survived", "2.7.6", head_outside, ()),
    "index-jumps": ("An available index that jumps is survived", "2.7.6", index_jumps, ()),
    "index-goes-back": ("An available index that goes back is survived", "2.7.6.1", index_goes_back, ()),
}

QUEUES = {QueueRole.INFLATE: Feature(0), QueueRole.REPORTING: Feature.REPORTING}


def _register(name: str, role: QueueRole) -> None:
    title, clause, malformed, lessons = KINDS[name]

    def run(rig: Rig) -> None:
        rig.start(raw={role})
        ring = rig.raw[role]
        first = rig.ram.pages(4)
        if role is QueueRole.REPORTING:
            gpa, length = first * PAGE_SIZE, 2 * PAGE_SIZE
        else:
            rig.ram.may_change([first])
            gpa, length = rig.write_pfns([first])
        heads = malformed(Bad(rig, ring, gpa, length))
        rig.judge.transcript.sent(f"{role.value}: {_first_line(malformed)}")
        ring.kick()
        rig.expect_recovery([ring], heads)

    add(
        f"chain-{name}-{role.value}",
        f"{title} ({role.value})",
        clause,
        run,
        offers=QUEUES[role],
        lessons=lessons,
    )


def _first_line(function: Malformed) -> str:
    text = (function.__doc__ or "").removesuffix(".")
    return text[:1].lower() + text[1:]


for _name in KINDS:
    for _role in QUEUES:
        _register(_name, _role)
