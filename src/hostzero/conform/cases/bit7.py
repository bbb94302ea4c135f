# SPDX-License-Identifier: GPL-2.0-only
"""Bit 7, DEVICE_INIT_ON_INFLATE: a bitmap behind the PFN array says which pages read as zero.

Bit N, counted from the least significant bit of byte N / 8, answers the N-th PFN of this request.
The used length is the bytes of bitmap that were written; bits beyond it mean nothing.
"""

from __future__ import annotations

import random

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.units import PAGE_SHIFT, PAGE_SIZE
from hostzero.virtio.balloon import ARRAY_PFNS_MAX, bitmap_bytes
from hostzero.virtio.features import Feature, QueueRole

CLAUSE = "proposal bit 7"
BIT_7 = Feature.DEVICE_INIT_ON_INFLATE
COUNTS = (1, 7, 8, 9, 16, 255, ARRAY_PFNS_MAX)


@case("bit7-used-length", "The used length is the bitmap's length or 0", CLAUSE, offers=BIT_7)
def used_length(rig: Rig) -> None:
    rig.start()
    for count in COUNTS:
        first = rig.ram.pages(count)
        answer = rig.inflate(range(first, first + count))
        rig.judge.must(
            answer.used_len in {0, bitmap_bytes(count)},
            f"for {count} PFNs the used length is {answer.used_len}, not {bitmap_bytes(count)} or 0",
        )


@case("bit7-claims-at-all", "Plain pages of RAM are claimed", CLAUSE, offers=BIT_7)
def claims_at_all(rig: Rig) -> None:
    rig.start()
    # A large host page can be dropped only if the request names all of it.
    count = max(64, rig.ram.host_page)
    first = rig.ram.pages(count, count)
    answer = rig.inflate(range(first, first + count))
    rig.judge.should(
        all(answer.claimed), f"{answer.claimed.count(False)} of {count} plain pages are not claimed"
    )


@case("bit7-content", "A claimed page reads as zero, again and again", CLAUSE, offers=BIT_7, lessons=(2, 3))
def content(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(64)
    pfns = range(first, first + 64, 2)
    for byte in (0x11, 0x22, 0x33):
        rig.ram.fill(first, 64, byte)
        # `inflate` compares the content with what the bitmap says.
        rig.inflate(pfns)
        rig.deflate(pfns)
    rig.expect_untouched()


@case("bit7-bit-order", "Bits are counted from the least significant one", CLAUSE, offers=BIT_7)
def bit_order(rig: Rig) -> None:
    rig.start()
    for holes in ({0}, {1, 2}, {0, 3, 9}, {7}, {8}):
        _expect_bits(rig, _with_holes(rig, 16, holes), holes)


@case("bit7-request-order", "Bit N answers the N-th PFN, whatever its value", CLAUSE, offers=BIT_7)
def request_order(rig: Rig) -> None:
    rig.start()
    for holes in ({2, 5, 31}, {0, 1, 17}):
        pfns = _with_holes(rig, 32, holes)
        good = [pfn for n, pfn in enumerate(pfns) if n not in holes]
        random.Random(7).shuffle(good)
        shuffled = [pfn if n in holes else good.pop() for n, pfn in enumerate(pfns)]
        _expect_bits(rig, shuffled, holes)


@case(
    "bit7-no-shift", "A PFN without RAM does not shift the bits of others", CLAUSE, offers=BIT_7, lessons=(6,)
)
def no_shift(rig: Rig) -> None:
    rig.start()
    for holes in ({100}, {64, 65, 66}, set(range(0, ARRAY_PFNS_MAX, 5))):
        _expect_bits(rig, _with_holes(rig, ARRAY_PFNS_MAX, holes), holes)


@case("bit7-clears", "Clear bits are written, too: the buffer may hold anything", CLAUSE, offers=BIT_7)
def clears(rig: Rig) -> None:
    rig.start()
    nowhere = rig.ram.nowhere >> PAGE_SHIFT
    answer = rig.inflate(range(nowhere, nowhere + 64))
    rig.judge.must(not any(answer.claimed), f"pages without RAM are claimed: bitmap {answer.bitmap.hex()}")


@case("bit7-behind-the-last-pfn", "Bits behind the last PFN are clear", CLAUSE, offers=BIT_7)
def behind_the_last(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(3)
    answer = rig.inflate([first, first + 1, first + 2])
    if answer.used_len:
        rig.judge.should(
            not answer.bitmap[0] >> 3,
            f"of 3 pages the bitmap says {answer.bitmap.hex()}: bits that answer nothing",
        )


@case(
    "bit7-longer-buffer",
    "In a buffer that is too long the bitmap is as long as it has to be",
    CLAUSE,
    offers=BIT_7,
)
def longer_buffer(rig: Rig) -> None:
    rig.start()
    at = rig.ram.control(64)
    first = rig.ram.pages(9)
    answer = rig.inflate(range(first, first + 9), bitmap=[(at, 64)])
    rig.judge.must(answer.used_len in {0, 2}, f"for 9 PFNs the used length is {answer.used_len}, not 2 or 0")


@case(
    "bit7-shorter-buffer", "A buffer that is too short is not overrun", "2.7.8.2", offers=BIT_7, lessons=(6,)
)
def shorter_buffer(rig: Rig) -> None:
    rig.start()
    at = rig.ram.control(64)
    rig.ram.write(at, b"\xc3" * 64)
    first = rig.ram.pages(64)
    # `send` compares the used length with the buffer.
    rig.inflate(range(first, first + 64), bitmap=[(at, 3)])
    behind = rig.ram.read(at + 3, 61)
    rig.judge.safe(
        behind == b"\xc3" * 61, f"bytes behind the bitmap buffer were written: {behind[:16].hex()}"
    )


@case(
    "bit7-no-buffer",
    "A request without a bitmap buffer is inflated, the used length is 0",
    "2.7.8.2",
    offers=BIT_7,
)
def no_buffer(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(9)
    answer = rig.inflate(range(first, first + 9), bitmap=[])
    rig.judge.must(answer.used_len == 0, f"the used length is {answer.used_len} without a writable byte")
    rig.expect_untouched()


@case("bit7-not-negotiated", "Without the bit a writable buffer is not written", "2.7.8.2")
def not_negotiated(rig: Rig) -> None:
    rig.start(drop=BIT_7)
    at = rig.ram.control(64)
    first = rig.ram.pages(9)
    rig.ram.write(at, b"\xff" * 64)
    answer = rig.inflate(range(first, first + 9), bitmap=[(at, 2)])
    rig.judge.must(
        answer.used_len == 0 or answer.bitmap[: answer.used_len] != b"\xff" * answer.used_len,
        f"the used length is {answer.used_len}, and nothing was written",
    )
    rig.judge.must(
        answer.bitmap == b"\xff\xff",
        f"a bitmap {answer.bitmap.hex()} was written, and the feature was not negotiated",
        CLAUSE,
    )


@case("bit7-buffer-in-pieces", "The bitmap buffer may lie in several descriptors", "2.7.4.1", offers=BIT_7)
def buffer_in_pieces(rig: Rig) -> None:
    rig.start()
    holes = {0, 9, 20, 35, 63}
    at = [rig.ram.control(16) for _ in range(4)]
    pieces = [(at[2], 1), (at[0], 3), (at[3], 1), (at[1], 3)]
    _expect_bits(rig, _with_holes(rig, 64, holes), holes, pieces)


@case("bit7-duplicates", "A page that is named twice is answered twice", CLAUSE, offers=BIT_7)
def duplicates(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(4)
    rig.inflate([page, page + 2, page, page, page + 3, page + 2])
    rig.expect_untouched()


@case(
    "bit7-bitmap-in-its-page",
    "The page that takes the bitmap is not claimed to be zero",
    CLAUSE,
    offers=BIT_7,
)
def bitmap_in_its_page(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(4)
    # The bitmap lies in the second page of the request; a set bit makes that page non-zero.
    pfns = range(first, first + 4)
    rig.ram.may_change(pfns)
    at = (first + 1) * PAGE_SIZE + 256
    rig.judge.transcript.sent(f"inflate 4 pages from {first:#x}, bitmap at {at:#x} within them")
    used_len = rig.send(QueueRole.INFLATE, [rig.write_pfns(pfns)], [(at, 1)])
    claimed = rig.claims(pfns, used_len, rig.ram.read(at, 1))
    for n, claim in enumerate(claimed):
        rig.judge.must(
            not claim or rig.ram.is_zero((first + n) * PAGE_SIZE, PAGE_SIZE),
            f"bit {n} is set, and page {first + n:#x} holds other bytes: the bitmap itself lies there",
        )
    rig.expect_untouched()


@case(
    "bit7-array-in-its-page",
    "A page that holds the request's own PFN array may go with it",
    CLAUSE,
    offers=BIT_7,
)
def array_in_its_page(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(4)
    pfns = range(first, first + 4)
    at = (first + 2) * PAGE_SIZE + 64
    rig.ram.write(at, b"".join(pfn.to_bytes(4, "little") for pfn in pfns))
    rig.inflate(pfns, arrays=[(at, 16)])
    rig.expect_untouched()


@case(
    "bit7-many-requests",
    "Requests with one notification have each their own bitmap",
    CLAUSE,
    offers=BIT_7,
    lessons=(8,),
)
def many_requests(rig: Rig) -> None:
    rig.start()
    count = min(16, rig.rings[QueueRole.INFLATE].room // 2)
    holes = [{n % 8, (n * 3) % 8} for n in range(count)]
    arrays = [_with_holes(rig, 8, hole) for hole in holes]
    places = [rig.ram.control(1) for _ in range(count)]
    for pfns, at in zip(arrays, places, strict=True):
        rig.ram.may_change(pfns)
        rig.ram.write(at, b"\xff")
    rig.judge.transcript.sent(f"{count} inflate requests of 8 PFNs, one notification")
    requests = [([rig.write_pfns(pfns)], [(at, 1)]) for pfns, at in zip(arrays, places, strict=True)]
    used = rig.submit(QueueRole.INFLATE, requests)
    for pfns, hole, at, used_len in zip(arrays, holes, places, used, strict=True):
        rig.judge.must(used_len in {0, 1}, f"the used length is {used_len}, not 1 or 0")
        _expect_claims(rig, pfns, hole, rig.claims(pfns, used_len, rig.ram.read(at, 1)))


def _with_holes(rig: Rig, count: int, holes: set[int]) -> list[int]:
    first = rig.ram.pages(count)
    nowhere = rig.ram.nowhere >> PAGE_SHIFT
    return [nowhere + n if n in holes else first + n for n in range(count)]


def _expect_bits(
    rig: Rig, pfns: list[int], holes: set[int], bitmap: list[tuple[int, int]] | None = None
) -> None:
    answer = rig.inflate(pfns, bitmap=bitmap)
    _expect_claims(rig, pfns, holes, answer.claimed)
    rig.expect_untouched()


def _expect_claims(rig: Rig, pfns: list[int], holes: set[int], claimed: tuple[bool, ...]) -> None:
    for n, (pfn, claim) in enumerate(zip(pfns, claimed, strict=True)):
        if claim:
            rig.judge.must(
                n not in holes, f"bit {n} is set, and PFN {n} of the request is {pfn:#x}, where no RAM is"
            )
            rig.judge.must(
                rig.ram.is_zero(pfn << PAGE_SHIFT, PAGE_SIZE),
                f"bit {n} is set, and page {pfn:#x} holds other bytes",
            )
    # All or nothing is the device's choice; but one that claims some has to claim the right ones.
    if any(claimed):
        missing = [n for n, claim in enumerate(claimed) if not claim and n not in holes]
        rig.judge.should(not missing, f"plain pages at {missing[:8]} of the request are not claimed")
