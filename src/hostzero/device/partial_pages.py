# SPDX-License-Identifier: GPL-2.0-only
"""Which 4 KiB sub-pages of large host pages are in the balloon.

A balloon deals in 4 KiB, but memory on huge pages can be dropped only by the huge page. Linux
sends at most 256 PFNs in a request and a page of 2 MiB has 512, so a device that forgets
between requests, as QEMU does (`PartiallyBalloonedPage` lives for one element), never drops a
2 MiB page on inflate. This set lives from the first inflate to the deflate or the reset.

Remembering is right only while the driver may not take a page back without asking, that is with
MUST_TELL_HOST negotiated. Without it the driver may use a page again before its deflate request
is answered (virtio 1.3, 5.5.6), and a set that remembered the page would complete a host page
that holds live data. `InflateQueue` keeps the set for one request only in that case.

Memory: one entry for each host page with a sub-page in the balloon, one bit for each sub-page,
and only host pages that lie whole in guest RAM have entries: at most RAM / 32768 bytes of bits
and RAM / page size entries. No request can make it larger.
"""

from __future__ import annotations

from collections.abc import Iterator

from hostzero.device.geometry import RamSpan
from hostzero.device.pfn_runs import PfnRun


class PartialPages:
    """The sub-pages in the balloon, by host page. Host pages are named by their first PFN."""

    def __init__(self) -> None:
        """Start with nothing in the balloon."""
        self._inflated: dict[int, int] = {}

    def __len__(self) -> int:
        """Return the host pages of which at least one sub-page is in the balloon."""
        return len(self._inflated)

    def add(self, span: RamSpan, run: PfnRun) -> list[int]:
        """Take sub-pages into the balloon and return the host pages that are in it entirely.

        Every host page that the run touches and that is complete afterwards is returned, the
        one that was complete before as well: its sub-pages have been out of the driver's hands
        all the time, so it may be dropped again. Host pages that the span cuts are not kept.

        Args:
            span: the RAM that holds all of the run.
            run: pages of 4 KiB.
        """
        complete = []
        for host_page, bits in _host_pages(span, run):
            if not span.holds_host_page(host_page):
                continue
            inflated = self._inflated.get(host_page, 0) | bits
            self._inflated[host_page] = inflated
            if inflated.bit_count() == span.sub_pages:
                complete.append(host_page)
        return complete

    def remove(self, span: RamSpan, run: PfnRun) -> None:
        """Let sub-pages out of the balloon; pages that were not in it are ignored."""
        for host_page, bits in _host_pages(span, run):
            inflated = self._inflated.get(host_page, 0) & ~bits
            if inflated:
                self._inflated[host_page] = inflated
            else:
                self._inflated.pop(host_page, None)

    def clear(self) -> None:
        """Forget everything: a reset, or a deflate request that could not be read."""
        self._inflated.clear()

    def inflated(self, span: RamSpan, pfn: int) -> bool:
        """Return whether one page of 4 KiB is known to be in the balloon."""
        host_page = span.host_page(pfn)
        return bool(self._inflated.get(host_page, 0) >> (pfn - host_page) & 1)


# Each host page that a run touches, with the bits of the sub-pages that are in the run.
def _host_pages(span: RamSpan, run: PfnRun) -> Iterator[tuple[int, int]]:
    host_page = span.host_page(run.first)
    while host_page < run.end:
        low = max(run.first - host_page, 0)
        high = min(run.end - host_page, span.sub_pages)
        yield host_page, ((1 << (high - low)) - 1) << low
        host_page += span.sub_pages
