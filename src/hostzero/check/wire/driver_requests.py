# SPDX-License-Identifier: GPL-2.0-only
"""What a driver may put into its requests and say of itself, read from virtio 1.3, 5.5.6, a second time.

A device drops the pages that a request names as long as it has the request. So whatever is wrong about
them is somebody's lost page, even if this device is kind and the bytes stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hostzero.check.wire.device_model import DEFLATE, INFLATE, PAGE, PAGE_POISON, REPORT
from hostzero.check.wire.wire_rings import SEGMENT, Parsed, gather, overlap
from hostzero.driver import State, VirtioBalloon
from hostzero.mm import MemoryManager
from hostzero.mm.page_flags import PGTY_buddy

DEFLATE_ON_OOM = 1 << 2
_ORDERS = range(11)


def wrong_request(
    mm: MemoryManager,
    users: Sequence[tuple[int, int, int]],
    taken: Sequence[SEGMENT],
    role: str,
    parsed: Parsed,
) -> str | None:
    """Return what is wrong with a request that a device has got, or None.

    Args:
        mm: the guest's memory manager.
        users: blocks of the guest's users: first page, order, and anything.
        taken: bytes of rings, and of other requests that the device has and may write to.
        role: the queue.
        parsed: the request.
    """
    if parsed.bad:
        return f"the driver sends a request that is {parsed.bad}"
    if overlap(parsed.readable, parsed.writable) or overlap(parsed.writable, taken):
        return "the driver lends bytes that are in use for something else"
    if role in {INFLATE, DEFLATE}:
        data = gather(lambda at, n: bytes(mm.ram_bytes[at : at + n]), parsed.readable, 1 << 20)
        pfns = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        if not pfns or len(data) % 4:
            return "the driver sends no whole array of page numbers"
        if len(set(pfns)) < len(pfns):
            return "the driver names a page twice in one request"
        if max(pfns) >= mm.nr_pages:
            return "the driver names a page that its guest does not have"
        return _not_ours(mm, users, pfns)
    if parsed.writable:
        if role == REPORT and (len(parsed.writable) > 1 or parsed.readable):
            return "the driver reports more than one block in a request"
        if any(start % PAGE or length % PAGE for start, length in parsed.writable):
            return "the driver hands over a part of a page"
        return _not_ours(mm, users, [page for part in parsed.writable for page in _pages(part)])
    return None


def wrong_word(driver: VirtioBalloon, mm: MemoryManager, at_boot: int, written: dict[int, int]) -> str | None:
    """Return which number does not fit what is in the balloon, or None; between two requests.

    Args:
        driver: the driver, after a call that came to its end.
        mm: the guest's memory manager.
        at_boot: pages that the guest counted as its own before there was a balloon.
        written: the fields of the configuration space that the driver wrote since the last reset.
    """
    pages = driver.num_pages
    counted = 0 if driver.features & DEFLATE_ON_OOM else pages
    if mm.vm_stats().total_pages != at_boot - counted:
        return "the guest does not count its balloon pages as it agreed"
    if mm.balloon.count != pages:
        return "the driver does not know how many pages are in its balloon"
    if driver.state is State.ACTIVE and written.get(4, 0) != pages:
        return "the host is not told how large the balloon is"
    if (
        driver.state is State.ACTIVE
        and driver.features & PAGE_POISON
        and written.get(12, 0) != driver.guest.poison_val
    ):
        return "the host is not told what free pages hold"
    return None


def free_pages(mm: MemoryManager, pfns: Iterable[int]) -> list[int]:
    """Return those of some pages that are in a block on a free list."""
    pages = mm.mem.mem_map[: mm.nr_pages]
    (heads,) = np.nonzero(pages["page_type"] == PGTY_buddy)
    orders = dict(zip(heads.tolist(), pages["private"][heads].tolist(), strict=True))
    return [pfn for pfn in pfns if any(orders.get(pfn >> order << order, -1) >= order for order in _ORDERS)]


def _not_ours(mm: MemoryManager, users: Sequence[tuple[int, int, int]], pfns: list[int]) -> str | None:
    if any(first <= pfn < first + (1 << order) for first, order, _ in users for pfn in pfns):
        return "the driver hands over a page that somebody in the guest uses"
    if free_pages(mm, pfns):
        return "the driver hands over a page that is free for anybody to take"
    return None


def _pages(part: SEGMENT) -> range:
    return range(part[0] // PAGE, (part[0] + part[1]) // PAGE)
