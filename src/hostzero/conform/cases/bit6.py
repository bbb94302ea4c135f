# SPDX-License-Identifier: GPL-2.0-only
"""Bit 6, DEVICE_INIT_REPORTED: the used length of a reported buffer says what reads as zero.

The buffer is the block itself, and the used length is how much of it the device has zeroed, from
its start. A driver believes only the exact length of the block, so a device that knows less says
0. Whoever adds up the segments that could be dropped tells lies as soon as one of them could not.
"""

from __future__ import annotations

from hostzero.conform.bringup import USUAL
from hostzero.conform.case import case
from hostzero.conform.judge import NotApplicable
from hostzero.conform.rig import Rig
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from hostzero.virtio.features import Feature, QueueRole

CLAUSE = "proposal bit 6"
BIT_6 = Feature.REPORTING | Feature.DEVICE_INIT_REPORTED
SIZES = (PAGE_SIZE, 2 * PAGE_SIZE, 64 << 10, PMD_SIZE, 2 * PMD_SIZE)


@case("bit6-used-length-exact", "The used length is the block's length or 0", CLAUSE, offers=BIT_6)
def used_length_exact(rig: Rig) -> None:
    rig.start()
    for size in SIZES:
        pages = size // PAGE_SIZE
        used_len = rig.report((rig.ram.pages(pages, pages) * PAGE_SIZE, size))
        rig.judge.must(used_len in {0, size}, f"a block of {size} bytes is answered with {used_len}")
    rig.expect_untouched()


@case("bit6-claims-at-all", "Plain RAM in aligned blocks is claimed", CLAUSE, offers=BIT_6)
def claims_at_all(rig: Rig) -> None:
    rig.start()
    pages = max(PMD_SIZE // PAGE_SIZE, rig.ram.host_page)
    size = pages * PAGE_SIZE
    used_len = rig.report((rig.ram.pages(pages, pages) * PAGE_SIZE, size))
    rig.judge.should(
        used_len == size, f"a block of {size} bytes is answered with {used_len}: the feature is of no use"
    )


@case(
    "bit6-content",
    "A claimed block reads as zero, each byte, again and again",
    CLAUSE,
    offers=BIT_6,
    lessons=(2, 3),
)
def content(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(64)
    for byte in (0x11, 0x22, 0x33):
        rig.ram.fill(first, 64, byte)
        # `report` compares the content with what the used length says.
        rig.report((first * PAGE_SIZE, 64 * PAGE_SIZE))
    rig.expect_untouched()


@case("bit6-twice", "A block that is zero already may be reported again", CLAUSE, offers=BIT_6)
def twice(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(16)
    for _ in range(2):
        used_len = rig.report((first * PAGE_SIZE, 16 * PAGE_SIZE))
        rig.judge.must(used_len in {0, 16 * PAGE_SIZE}, f"16 pages are answered with {used_len}")


@case("bit6-part-of-a-page", "What a discard cannot cover is not claimed", CLAUSE, offers=BIT_6, lessons=(4,))
def part_of_a_page(rig: Rig) -> None:
    rig.start()
    for offset, length in (
        (0, PAGE_SIZE // 2),
        (512, PAGE_SIZE),
        (0, 3 * PAGE_SIZE - 64),
        (PAGE_SIZE // 2, PMD_SIZE),
    ):
        first = rig.ram.pages(length // PAGE_SIZE + 3)
        rig.report((first * PAGE_SIZE + offset, length))


@case(
    "bit6-partial-failure",
    "A buffer of several segments, one of which cannot be dropped, claims none that is not zero",
    CLAUSE,
    offers=BIT_6,
    lessons=(6,),
)
def partial_failure(rig: Rig) -> None:
    rig.start()
    for bad in range(3):
        segments = []
        for n in range(3):
            first = rig.ram.pages(4)
            segments.append((first * PAGE_SIZE + (512 if n == bad else 0), 2 * PAGE_SIZE))
        rig.report(*segments)
    rig.expect_untouched()


@case(
    "bit6-attribution", "In a batch each buffer is answered for itself", CLAUSE, offers=BIT_6, lessons=(6, 8)
)
def attribution(rig: Rig) -> None:
    rig.start()
    blocks = []
    for n in range(min(24, rig.rings[QueueRole.REPORTING].room)):
        first = rig.ram.pages(6)
        rig.ram.may_change(range(first, first + 6))
        blocks.append((first * PAGE_SIZE + (512 if n % 3 == 1 else 0), (n % 4 + 1) * PAGE_SIZE))
    rig.judge.transcript.sent(f"report {len(blocks)} blocks, every third of them not on a page boundary")
    used = rig.submit(QueueRole.REPORTING, [((), [block]) for block in blocks])
    rig.judge.transcript.came(f"used lengths {used}")
    for block, used_len in zip(blocks, used, strict=True):
        rig.judge.must(used_len in {0, block[1]}, f"a block of {block[1]} bytes is answered with {used_len}")
        rig.expect_zero_prefix([block], used_len)


@case(
    "bit6-not-negotiated",
    "Without the bit the used length claims nothing",
    "2.7.8.2",
    offers=Feature.REPORTING,
    lessons=(1,),
)
def not_negotiated(rig: Rig) -> None:
    rig.start(drop=Feature.DEVICE_INIT_REPORTED)
    first = rig.ram.pages(16)
    used_len = rig.report((first * PAGE_SIZE, 16 * PAGE_SIZE))
    rig.judge.should(
        used_len == 0, f"the used length is {used_len} without bit 6: a driver could take it for a claim"
    )
    # A block that cannot be dropped shows whether the length is what was written or what was named.
    rig.report((rig.ram.pages(4) * PAGE_SIZE + 512, PAGE_SIZE))


@case(
    "bit6-without-reporting",
    "Bit 6 without REPORTING is refused, or means nothing",
    CLAUSE,
    offers=BIT_6,
    lessons=(7,),
)
def without_reporting(rig: Rig) -> None:
    if not rig.start(rig.offered() & USUAL & ~Feature.REPORTING, insist=False):
        return
    rig.expect_works()
    if QueueRole.FREE_PAGE in rig.rings:
        # Who has bit 6 for HINT_WAIT_ON_ACK must not make a claim about hints of it.
        page = rig.ram.pages(2)
        used_len = rig.send(QueueRole.FREE_PAGE, (), [(page * PAGE_SIZE, 2 * PAGE_SIZE)])
        rig.expect_zero_prefix([(page * PAGE_SIZE, 2 * PAGE_SIZE)], used_len)


@case(
    "bit6-over-the-end",
    "A block that runs off the end of RAM is not claimed",
    CLAUSE,
    offers=BIT_6,
    lessons=(9,),
)
def over_the_end(rig: Rig) -> None:
    end = rig.ram.end_of_ram
    if end is None:
        raise NotApplicable("the arena of this target does not end where RAM ends")
    rig.start(raw={QueueRole.REPORTING})
    ring = rig.raw[QueueRole.REPORTING]
    rig.ram.may_change([(end >> PAGE_SHIFT) - 1])
    ring.guest.offer(ring.guest.chain([(end - PAGE_SIZE, 2 * PAGE_SIZE, 2)]))
    rig.judge.transcript.sent(f"report 2 pages at {end - PAGE_SIZE:#x}, of which the second is no RAM")
    ring.kick()
    rig.settle(lambda: bool(ring.look()) or rig.needs_reset())
    for _, used_len in ring.returned:
        rig.judge.must(
            used_len <= PAGE_SIZE and (not used_len or rig.ram.is_zero(end - PAGE_SIZE, used_len)),
            f"the used length {used_len} claims what is no RAM or no zero",
        )
    rig.expect_untouched()
