# SPDX-License-Identifier: GPL-2.0-only
"""Inflate: pages go into the balloon, all of those that the request names and no others."""

from __future__ import annotations

import itertools
import random

from hostzero.conform.case import case
from hostzero.conform.judge import NotApplicable
from hostzero.conform.rig import Answer, Rig
from hostzero.errors import RamError
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE
from hostzero.virtio.balloon import ARRAY_PFNS_MAX
from hostzero.virtio.features import Feature, QueueRole

BIT_7 = Feature.DEVICE_INIT_ON_INFLATE
TRUNCATION = 1 << 20
"""PFNs above a PFN whose address is the same in 32 bits."""


@case("inflate-one", "One page is inflated, and the request comes back", "5.5.6")
def one(rig: Rig) -> None:
    rig.start()
    rig.inflate([rig.ram.pages(1)])


@case("inflate-256-in-any-order", "256 pages in any order, as many as Linux sends at once", "5.5.6")
def any_order(rig: Rig) -> None:
    rig.start()
    rig.inflate(_scattered(rig, ARRAY_PFNS_MAX))


@case("inflate-only-the-named", "Pages beside those of the request keep their bytes", "5.5.6.2")
def only_the_named(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(64)
    rig.inflate([first + n for n in range(64) if n % 3])
    rig.expect_untouched()


@case("inflate-gives-memory-back", "The host's memory under inflated pages is freed", "5.5", lessons=(2,))
def gives_memory_back(rig: Rig) -> None:
    rig.start()
    pages = PMD_SIZE // PAGE_SIZE
    first = rig.ram.pages(pages, align=pages)
    before = _resident(rig, first, pages)
    rig.judge.must(before > 0, "the suite's own pattern takes no memory", "the suite")
    _inflate_unseen(rig, first, pages)
    after = _resident(rig, first, pages)
    rig.judge.should(
        after == 0, f"of {before} bytes that {pages} pages took, {after} are still there after the inflate"
    )


@case(
    "inflate-huge-host-page",
    "A large host page is freed once all of it is in the balloon, over several requests",
    "5.5",
    offers=Feature.MUST_TELL_HOST,
    lessons=(5,),
)
def huge_host_page(rig: Rig) -> None:
    pages = rig.ram.host_page
    if pages <= ARRAY_PFNS_MAX:
        raise NotApplicable(f"guest memory is on host pages of {pages * PAGE_SIZE} bytes; see --backing")
    rig.start()
    first = rig.ram.pages(pages, align=pages)
    _inflate_unseen(rig, first, pages)
    after = _resident(rig, first, pages)
    rig.judge.should(
        after == 0, f"{after} bytes of a host page are still there, and all of it is in the balloon"
    )


@case("inflate-duplicates", "A page may be named twice", "5.5.6")
def duplicates(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(3)
    rig.inflate([page, page, page + 2, page])
    rig.expect_untouched()


@case("inflate-again", "A page that is in the balloon may be inflated again", "5.5.6")
def again(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(1)
    rig.inflate([page])
    rig.inflate([page])


@case("inflate-many-at-once", "Many requests with one notification come back, each once", "2.7.8")
def many_at_once(rig: Rig) -> None:
    rig.start()
    count = rig.rings[QueueRole.INFLATE].room // 2
    first = rig.ram.pages(count)
    rig.ram.may_change(range(first, first + count))
    nothing: list[tuple[int, int]] = []
    requests = [([rig.write_pfns([first + n])], nothing) for n in range(count)]
    rig.judge.transcript.sent(f"{count} inflate requests, one notification")
    used = rig.submit(QueueRole.INFLATE, requests)
    rig.judge.must(not any(used), f"used lengths {sorted(set(used))} for buffers without a writable byte")
    rig.expect_untouched()


@case("inflate-array-in-pieces", "The PFN array may lie in several descriptors, cut anywhere", "2.7.4.1")
def array_in_pieces(rig: Rig) -> None:
    rig.start()
    first = rig.ram.pages(32)
    pfns = [first + n for n in range(0, 32, 2)]
    gpa, length = rig.write_pfns(pfns)
    # Within a PFN, too: the framing of a message says nothing about its contents.
    cuts = [0, 1, 6, 12, 35, 36, length]
    arrays = [(gpa + start, end - start) for start, end in itertools.pairwise(cuts)]
    answer = rig.inflate(pfns, arrays=arrays)
    rig.expect_untouched()
    _expect_taken(rig, pfns, answer.claimed)


@case("inflate-used-length", "Without a writable buffer the used length is 0", "2.7.8.2")
def used_length(rig: Rig) -> None:
    rig.start(drop=BIT_7)
    page = rig.ram.pages(3)
    answer = rig.inflate([page, page + 1, page + 2])
    rig.judge.must(
        answer.used_len == 0, f"the used length is {answer.used_len}, and nothing could be written"
    )


@case("inflate-no-late-change", "After the answer the page is the guest's to write", "5.5.6.2")
def no_late_change(rig: Rig) -> None:
    # With MUST_TELL_HOST the device may change pages until they are deflated.
    rig.start(drop=Feature.MUST_TELL_HOST)
    first = rig.ram.pages(8)
    rig.inflate(range(first, first + 8))
    rig.judge.transcript.sent("write to the pages, without deflating")
    rig.ram.fill(first, 8, 0x5A)
    other = rig.ram.pages(8)
    rig.inflate(range(other, other + 8))
    rig.quiet()
    rig.judge.must(
        all(rig.ram.is_kept(first + n) for n in range(8)),
        "a page changed after its inflate request had come back, without MUST_TELL_HOST",
    )


@case("inflate-second-region", "Pages above 4 GiB are inflated as others", "5.5.6")
def second_region(rig: Rig) -> None:
    regions = [region for region in rig.ram.memory.regions if region.gpa >= 1 << 32]
    if not regions:
        raise NotApplicable("guest memory has no part above 4 GiB")
    rig.start()
    first = regions[0].gpa >> PAGE_SHIFT
    rig.ram.memory.write(regions[0].gpa, b"\x77" * (4 * PAGE_SIZE))
    rig.inflate([first, first + 2])
    for kept in (first + 1, first + 3):
        rig.judge.safe(
            rig.ram.read(kept << PAGE_SHIFT, PAGE_SIZE) == b"\x77" * PAGE_SIZE, f"page {kept:#x} was changed"
        )
    rig.expect_untouched()


@case("inflate-last-page", "The last page of RAM is inflated, and nothing behind it", "5.5.6")
def last_page(rig: Rig) -> None:
    rig.start()
    last = rig.ram.last_pages(1)
    rig.inflate([last])
    rig.expect_untouched()


@case(
    "inflate-outside-ram", "A PFN without RAM is passed over, the others are served", "5.5.6.2", lessons=(9,)
)
def outside_ram(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(4)
    nowhere = rig.ram.nowhere >> PAGE_SHIFT
    _provoke(rig, [page, nowhere, page + 2, nowhere + 7])
    rig.expect_recovered()


@case("inflate-largest-pfn", "No PFN is cut to 32 bits of address", "5.5.6.2", lessons=(9,))
def largest_pfn(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(1)
    # `pfn << 12` in 32 bits would be the address of `page`.
    far = [page + n * TRUNCATION for n in (1, 2, 0x800) if not _is_ram(rig, page + n * TRUNCATION)]
    _provoke(rig, [*far, 0xFFFF_FFFF])
    rig.expect_recovered()


@case(
    "inflate-ragged-array",
    "An array that is no whole number of PFNs names no further page",
    "5.5.6",
    lessons=(8,),
)
def ragged_array(rig: Rig) -> None:
    page = rig.ram.pages(2)
    for extra in (1, 2, 3):
        rig.start(drop=BIT_7)
        gpa, _ = rig.write_pfns([page, page + 1])
        rig.ram.may_change([page])
        rig.judge.transcript.sent(f"inflate with an array of {4 + extra} bytes")
        rig.provoke(QueueRole.INFLATE, [(gpa, 4 + extra)])
        rig.expect_recovered()
        rig.renew()


@case("inflate-over-long", "A request far longer than any driver sends comes back", "5.5.6", lessons=(8,))
def over_long(rig: Rig) -> None:
    page = rig.ram.pages(1)
    for count in (2 * ARRAY_PFNS_MAX, 2048, 1 << 17):
        rig.start(drop=BIT_7)
        rig.ram.may_change([page])
        rig.judge.transcript.sent(f"inflate {count} times the page {page:#x}")
        rig.provoke(QueueRole.INFLATE, [rig.write_pfns([page] * count)])
        rig.expect_recovered()
        rig.renew()


@case("inflate-flood-of-one-page", "A flood of requests for one page is served like any other", "5.5.6")
def flood(rig: Rig) -> None:
    rig.start(drop=BIT_7)
    page = rig.ram.pages(1)
    rig.ram.may_change([page])
    # virtio-win sends pointer-sized PFNs: every other one is 0.
    array = rig.write_pfns([page] * 1024)
    room = rig.rings[QueueRole.INFLATE].room
    for _ in range(4):
        rig.submit(QueueRole.INFLATE, [([array], [])] * room)
    rig.expect_untouched()
    rig.expect_works()


@case("inflate-ring-wraps", "65536 requests and more: the indices wrap", "2.7.6")
def ring_wraps(rig: Rig) -> None:
    rig.start(drop=BIT_7, raw={QueueRole.DEFLATE})
    ring = rig.raw[QueueRole.DEFLATE]
    size = ring.layout.size
    gpa, length = rig.write_pfns([rig.ram.pages(1)])
    for head in range(size):
        ring.guest.descriptor(head, gpa, length)
        ring.guest.set_avail_entry(head, head)
    rounds = (1 << 16) // size + 2
    rig.judge.transcript.sent(f"{rounds} times {size} deflate requests")
    for turn in range(1, rounds + 1):
        wanted = turn * size & 0xFFFF
        # With the event index the device is asked to interrupt for the last of them.
        ring.guest.set_used_event(wanted - 1)
        ring.guest.set_avail_idx(wanted)
        ring.kick()
        if not rig.settle(lambda wanted=wanted: ring.guest.used_idx == wanted):  # type: ignore[misc]
            rig.judge.fail(
                f"after {turn - 1} rings of requests the used index stays at {ring.guest.used_idx}"
            )
    heads = {ring.guest.used_entry(slot)[0] for slot in range(size)}
    rig.judge.must(heads == set(range(size)), "the last ring of used entries does not name each head once")


@case("inflate-is-no-size", "The device leaves `actual` to the driver", "5.5.6")
def is_no_size(rig: Rig) -> None:
    rig.start()
    rig.write_actual(0)
    first = rig.ram.pages(8)
    rig.inflate(range(first, first + 8))
    actual = rig.config().actual
    rig.judge.must(actual == 0, f"`actual` reads {actual} after an inflate; the driver had written 0")


def _scattered(rig: Rig, count: int) -> list[int]:
    first = rig.ram.pages(2 * count)
    pfns = list(range(first, first + 2 * count, 2))
    random.Random(5).shuffle(pfns)
    return pfns


def _provoke(rig: Rig, pfns: list[int]) -> None:
    rig.ram.may_change(pfns)
    bitmap = [(rig.ram.control(1), 1)] if BIT_7 in rig.accepted else []
    rig.judge.transcript.sent(f"inflate {', '.join(f'{pfn:#x}' for pfn in pfns)}")
    used_len = rig.provoke(QueueRole.INFLATE, [rig.write_pfns(pfns)], bitmap)
    if used_len:
        data = rig.ram.read(bitmap[0][0], 1)
        rig.expect_true(pfns, Answer(used_len, data, rig.claims(pfns, used_len, data)))


# Without a look at what is in the pages: to read a hole of a shared file gives it a page again.
def _inflate_unseen(rig: Rig, first: int, pages: int) -> None:
    rig.ram.may_change(range(first, first + pages))
    for at in range(first, first + pages, ARRAY_PFNS_MAX):
        rig.judge.transcript.sent(f"inflate {ARRAY_PFNS_MAX} pages from {at:#x}")
        rig.send(QueueRole.INFLATE, [rig.write_pfns(range(at, at + ARRAY_PFNS_MAX))])


def _resident(rig: Rig, first: int, pages: int) -> int:
    try:
        return rig.ram.resident(first, pages)
    except RamError as error:
        raise NotApplicable(f"the kernel does not say what is resident: {error}") from error


def _is_ram(rig: Rig, pfn: int) -> bool:
    return any(r.gpa <= pfn << PAGE_SHIFT < r.gpa + r.size for r in rig.ram.memory.regions)


# A device need not drop a page at all; but one that answers for its pages has understood them.
def _expect_taken(rig: Rig, pfns: list[int], claimed: tuple[bool, ...]) -> None:
    if BIT_7 in rig.accepted and rig.ram.host_page == 1:
        rig.judge.should(
            all(claimed), f"{claimed.count(False)} of {len(pfns)} plain pages of RAM were not zeroed"
        )
