# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting: blocks as writable buffers, dropped in place; what must not be dropped."""

from __future__ import annotations

from hostzero.conform.case import case
from hostzero.conform.judge import NotApplicable
from hostzero.conform.rig import Rig
from hostzero.errors import RamError
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from hostzero.virtio.features import Feature, QueueRole

REPORTING = Feature.REPORTING
PMD_PAGES = PMD_SIZE // PAGE_SIZE


@case("report-one", "One block is reported, and the buffer comes back", "5.5.6.7", offers=REPORTING)
def one(rig: Rig) -> None:
    rig.start()
    rig.report((rig.ram.pages(PMD_PAGES, PMD_PAGES) * PAGE_SIZE, PMD_SIZE))


@case(
    "report-many-at-once",
    "A batch of buffers with one notification, as Linux sends it",
    "5.5.6.7",
    offers=REPORTING,
)
def many_at_once(rig: Rig) -> None:
    rig.start()
    count = min(32, rig.rings[QueueRole.REPORTING].room)
    firsts = [rig.ram.pages(4) for _ in range(count)]
    for first in firsts:
        rig.ram.may_change(range(first, first + 4))
    rig.judge.transcript.sent(f"report {count} blocks of 16 KiB")
    blocks = [(first * PAGE_SIZE, 4 * PAGE_SIZE) for first in firsts]
    used = rig.submit(QueueRole.REPORTING, [((), [block]) for block in blocks])
    for block, used_len in zip(blocks, used, strict=True):
        rig.within(used_len, block[1])
        rig.expect_zero_prefix([block], used_len)
    rig.expect_untouched()


@case(
    "report-one-buffer-of-many",
    "One buffer of many blocks, as Linux without bit 6 sends it",
    "5.5.6.7",
    offers=REPORTING,
)
def one_buffer_of_many(rig: Rig) -> None:
    rig.start()
    count = min(16, rig.rings[QueueRole.REPORTING].room)
    rig.report(*[(rig.ram.pages(2) * PAGE_SIZE, 2 * PAGE_SIZE) for _ in range(count)])
    rig.expect_untouched()


@case(
    "report-gives-memory-back",
    "The host's memory under a reported block is freed",
    "5.5.6.7",
    offers=REPORTING,
    lessons=(2,),
)
def gives_memory_back(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(PMD_PAGES, PMD_PAGES)
    try:
        before = rig.ram.resident(first, PMD_PAGES)
    except RamError as error:
        raise NotApplicable(f"the kernel does not say what is resident: {error}") from error
    # Without a look at what is in the block: to read a hole of a shared file gives it a page again.
    rig.ram.may_change(range(first, first + PMD_PAGES))
    rig.judge.transcript.sent(f"report 2 MiB at {first * PAGE_SIZE:#x}")
    rig.send(QueueRole.REPORTING, (), [(first * PAGE_SIZE, PMD_SIZE)])
    after = rig.ram.resident(first, PMD_PAGES)
    rig.judge.must(before > 0, "the suite's own pattern takes no memory", "the suite")
    rig.judge.should(after == 0, f"of {before} bytes that a block of 2 MiB took, {after} are still there")


@case(
    "report-only-the-named", "Pages beside a reported block keep their bytes", "5.5.6.7.2", offers=REPORTING
)
def only_the_named(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(16)
    rig.report(((first + 4) * PAGE_SIZE, 4 * PAGE_SIZE), ((first + 9) * PAGE_SIZE, PAGE_SIZE))
    rig.expect_untouched()


@case(
    "report-part-of-a-page",
    "Half a page is no page: the other half stays",
    "5.5.6.7.2",
    offers=REPORTING,
    lessons=(4,),
)
def part_of_a_page(rig: Rig) -> None:
    rig.start()
    _report_ragged(rig, 0, PAGE_SIZE // 2)
    _report_ragged(rig, 0, PAGE_SIZE + 512)
    _report_ragged(rig, 0, 1)


@case(
    "report-unaligned",
    "A block that starts within a page leaves the rest of that page",
    "5.5.6.7.2",
    offers=REPORTING,
    lessons=(4,),
)
def unaligned(rig: Rig) -> None:
    rig.start()
    _report_ragged(rig, PAGE_SIZE // 2, PAGE_SIZE)
    _report_ragged(rig, 64, 2 * PAGE_SIZE)
    _report_ragged(rig, PAGE_SIZE - 1, 2)


@case("report-outside-ram", "A block without RAM is survived", "5.5.6.7", offers=REPORTING, lessons=(9,))
def outside_ram(rig: Rig) -> None:
    rig.start(raw={QueueRole.REPORTING})
    _hostile(rig, [(rig.ram.nowhere, PMD_SIZE)])


@case(
    "report-over-the-end",
    "A block that starts in RAM and runs off its end is survived",
    "5.5.6.7",
    offers=REPORTING,
    lessons=(9,),
)
def over_the_end(rig: Rig) -> None:
    end = rig.ram.end_of_ram
    if end is None:
        raise NotApplicable("the arena of this target does not end where RAM ends")
    rig.start(raw={QueueRole.REPORTING})
    rig.ram.may_change([(end >> PAGE_SHIFT) - 1])
    _hostile(rig, [(end - PAGE_SIZE, 4 * PAGE_SIZE)])


@case(
    "report-length-of-4-gib",
    "A block with the largest length is survived",
    "5.5.6.7",
    offers=REPORTING,
    lessons=(9,),
)
def length_of_4_gib(rig: Rig) -> None:
    rig.start(raw={QueueRole.REPORTING})
    page = rig.ram.pages(1)
    # No byte of it may be dropped: it is not all RAM.
    _hostile(rig, [(page * PAGE_SIZE, 0xFFFF_F000)], exempt=range(page, rig.ram.data.stop >> PAGE_SHIFT))


@case("report-readable-block", "A block that is device-readable is not written", "2.7.5.1", offers=REPORTING)
def readable_block(rig: Rig) -> None:
    rig.start(raw={QueueRole.REPORTING})
    ring = rig.raw[QueueRole.REPORTING]
    page = rig.ram.pages(4)
    ring.guest.offer(ring.guest.chain([(page * PAGE_SIZE, 4 * PAGE_SIZE, 0)]))
    rig.judge.transcript.sent(f"report 4 pages from {page:#x}, device-readable")
    ring.kick()
    rig.expect_recovery([ring], heads=1)


@case(
    "report-late-change", "After the answer the block is the guest's to write", "5.5.6.7.2", offers=REPORTING
)
def late_change(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(64)
    rig.report((first * PAGE_SIZE, 64 * PAGE_SIZE))
    rig.judge.transcript.sent("write to the reported block")
    rig.ram.fill(first, 64, 0x2D)
    other = rig.ram.pages(64)
    rig.report((other * PAGE_SIZE, 64 * PAGE_SIZE))
    rig.quiet()
    rig.expect_untouched()


@case(
    "report-its-own-ring",
    "A block that holds the ring of its own queue is survived",
    "5.5.6.7",
    offers=REPORTING,
)
def its_own_ring(rig: Rig) -> None:
    rig.start(raw={QueueRole.REPORTING})
    ring = rig.raw[QueueRole.REPORTING]
    at = ring.layout.desc
    ring.guest.offer(ring.guest.chain([(at, PAGE_SIZE, 2)]))
    rig.judge.transcript.sent(f"report the page at {at:#x}, where the ring of this queue lies")
    ring.kick()
    # What is in the ring afterwards is the driver's own doing.
    rig.quiet()
    rig.judge.safe(rig.connection.alive(), "the device went away")
    rig.expect_untouched()
    rig.renew()
    rig.start()
    rig.expect_works()


def _report_ragged(rig: Rig, offset: int, length: int) -> None:
    page = rig.ram.pages(4)
    start = page * PAGE_SIZE + offset
    rig.report((start, length))
    # Bytes of the buffer may change; those around it, in the same pages, may not.
    pattern_kept = [
        rig.ram.kept(page * PAGE_SIZE, offset),
        rig.ram.kept(start + length, 4 * PAGE_SIZE - offset - length),
    ]
    rig.judge.must(
        all(pattern_kept),
        f"a report of {length} bytes at {start:#x} changed bytes of those pages outside the buffer",
    )
    rig.expect_untouched()


def _hostile(rig: Rig, segments: list[tuple[int, int]], exempt: range = range(0)) -> None:
    ring = rig.raw[QueueRole.REPORTING]
    ring.guest.offer(ring.guest.chain([(gpa, length, 2) for gpa, length in segments]))
    rig.judge.transcript.sent(
        f"report {', '.join(f'{length:#x} bytes at {gpa:#x}' for gpa, length in segments)}"
    )
    rig.ram.may_change(exempt)
    ring.kick()
    rig.expect_recovery([ring], heads=1)
