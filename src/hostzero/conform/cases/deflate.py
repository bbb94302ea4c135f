# SPDX-License-Identifier: GPL-2.0-only
"""Deflate: pages leave the balloon, and nothing happens to what is in them."""

from __future__ import annotations

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.units import PAGE_SHIFT
from hostzero.virtio.balloon import ARRAY_PFNS_MAX
from hostzero.virtio.features import Feature, QueueRole


@case("deflate-one", "One page is deflated, and the request comes back", "5.5.6")
def one(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(1)
    rig.inflate([page])
    used_len = rig.deflate([page])
    rig.judge.must(used_len == 0, f"the used length is {used_len}, and nothing could be written", "2.7.8.2")


@case("deflate-256", "256 pages are deflated at once", "5.5.6")
def many(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(ARRAY_PFNS_MAX)
    pfns = range(first, first + ARRAY_PFNS_MAX)
    rig.inflate(pfns)
    rig.deflate(pfns)


@case("deflate-keeps-what-is-written-after", "What is written after the deflate stays", "5.5.6.2")
def keeps_later_writes(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(16)
    rig.inflate(range(first, first + 16))
    rig.deflate(range(first, first + 8))
    rig.judge.transcript.sent("write to the deflated pages")
    rig.ram.fill(first, 8, 0x3C)
    rig.inflate(range(first + 8, first + 16))
    other = rig.ram.pages(64)
    rig.inflate(range(other, other + 64))
    rig.quiet()
    rig.expect_untouched()


@case("deflate-never-inflated", "Pages that were never in the balloon keep their bytes", "5.5.6.2")
def never_inflated(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(8)
    rig.deflate(range(first, first + 8))
    rig.quiet()
    rig.expect_untouched()


@case("deflate-outside-ram", "PFNs without RAM are passed over", "5.5.6", lessons=(9,))
def outside_ram(rig: Rig) -> None:
    rig.start()
    nowhere = rig.ram.nowhere >> PAGE_SHIFT
    pfns = [nowhere, 0xFFFF_FFFF, rig.ram.pages(1), nowhere + 1]
    rig.judge.transcript.sent(f"deflate {', '.join(f'{pfn:#x}' for pfn in pfns)}")
    rig.provoke(QueueRole.DEFLATE, [rig.write_pfns(pfns)])
    rig.expect_recovered()


@case("deflate-writes-nothing", "A writable buffer behind the array is not written", "2.7.8.2")
def writes_nothing(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(1)
    rig.inflate([page])
    at = rig.ram.control(64)
    rig.ram.write(at, b"\xd7" * 64)
    rig.judge.transcript.sent(f"deflate {page:#x} with a writable buffer of 64 bytes")
    used_len = rig.send(QueueRole.DEFLATE, [rig.write_pfns([page])], [(at, 64)])
    rig.judge.must(
        used_len == 0 or rig.ram.read(at, used_len) != b"\xd7" * used_len,
        f"the used length is {used_len}, and not a byte of the buffer was written",
    )
    rig.judge.should(
        used_len == 0, f"{used_len} bytes were written, and no text says what they mean", "5.5.6"
    )


@case(
    "deflate-without-must-tell", "A driver without MUST_TELL_HOST may use pages before it says so", "5.5.6.2"
)
def without_must_tell(rig: Rig) -> None:
    rig.start(drop=Feature.MUST_TELL_HOST)
    first = rig.ram.pages(8)
    rig.inflate(range(first, first + 8))
    rig.judge.transcript.sent("write to the pages, then deflate them")
    rig.ram.fill(first, 8, 0x69)
    rig.deflate(range(first, first + 8))
    rig.quiet()
    rig.expect_untouched()


@case("deflate-cycles", "Pages go in and out again and again, each time with their own bytes", "5.5.6")
def cycles(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(32)
    pfns = range(first, first + 32)
    for turn in range(8):
        rig.inflate(pfns)
        rig.deflate(pfns)
        rig.ram.fill(first, 32, 0x10 + turn)
        rig.expect_untouched()


@case("deflate-ragged-array", "An array that is no whole number of PFNs comes back", "5.5.6", lessons=(8,))
def ragged_array(rig: Rig) -> None:
    page = rig.ram.pages(1)
    for length in (1, 3, 5, 7):
        rig.start()
        gpa, _ = rig.write_pfns([page, 0])
        rig.judge.transcript.sent(f"deflate with an array of {length} bytes")
        rig.provoke(QueueRole.DEFLATE, [(gpa, length)])
        rig.expect_recovered()
        rig.renew()
