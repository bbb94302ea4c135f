# SPDX-License-Identifier: GPL-2.0-only
"""Growing and shrinking the balloon (kernel: `fill_balloon`, `leak_balloon`, `tell_host`).

With DEVICE_INIT_ON_INFLATE (bit 7, patch 36) an inflate request carries a bitmap for the
device to fill: bit n, counted from the least significant bit of the first byte, says that the
n-th PFN of this request reads as zero now. Nothing in the guest touches a balloon page, so
what was zero then is zero when the page leaves the balloon, and it is freed as such.

The host is always told before a page leaves the balloon, with MUST_TELL_HOST or without: a
discard that is still to come would otherwise hit the next owner's data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Final

import numpy as np

from hostzero.driver.buffers import DriverBuffers, as_pfns
from hostzero.driver.guest_mm import GuestMm, Mask, Pfns
from hostzero.driver.queues import BalloonQueue
from hostzero.errors import DriverError, HostzeroError, OutOfMemory
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_NOMEMALLOC, GFP_NORETRY, GFP_NOWARN
from hostzero.units import PAGE_SHIFT, Pfn
from hostzero.virtio.balloon import ARRAY_PFNS_MAX, VIRTIO_BALLOON_PFN_SHIFT, bitmap_to_mask
from hostzero.virtio.features import Feature

_log = logging.getLogger(__name__)

BALLOON_GFP: Final = GFP_HIGHUSER_MOVABLE | GFP_NORETRY | GFP_NOMEMALLOC | GFP_NOWARN
"""Without __GFP_ZERO: the host is about to throw the contents away (kernel: `balloon_page_alloc`)."""

PAGES_PER_PAGE: Final = 1 << (PAGE_SHIFT - VIRTIO_BALLOON_PFN_SHIFT)
"""PFNs of the balloon's 4 KiB in one guest page (kernel: `VIRTIO_BALLOON_PAGES_PER_PAGE`)."""


def trusted_pages(bitmap: bytes, used_len: int, pfns: int, pages_per_page: int = PAGES_PER_PAGE) -> Mask:
    """Return which guest pages of a request the device has shown to be zero.

    A bit counts only if the device says that it wrote its byte: bits from `used_len` * 8 on are
    untrusted whatever they hold, and a `used_len` beyond the buffer proves nothing about bytes
    outside it. A guest page above 4 KiB is zero only if all of its PFNs are.

    Args:
        bitmap: the buffer as it came back, one bit for each PFN.
        used_len: the used length in bytes, as the device wrote it.
        pfns: the PFNs in the request.
        pages_per_page: PFNs that make one guest page.

    Returns:
        A boolean array of shape (pfns / pages_per_page,), in the order of the request.
    """
    written = max(0, min(used_len, len(bitmap)))
    zero = bitmap_to_mask(bitmap[:written], pfns)
    return np.asarray(zero.reshape(-1, pages_per_page).all(axis=1))


class Inflation:
    """The balloon as one driver holds it.

    Attributes:
        num_pages: pages of 4 KiB that the host was told of (kernel: `vb->num_pages`).
        locked: whether a request is under way (kernel: `balloon_lock`).
    """

    def __init__(
        self,
        mm: GuestMm,
        buffers: DriverBuffers,
        inflate: BalloonQueue,
        deflate: BalloonQueue,
        features: Feature,
    ) -> None:
        self.num_pages = 0
        self.locked = False
        self._mm = mm
        self._buffers = buffers
        self._inflate = inflate
        self._deflate = deflate
        self._features = features
        self._tokens = count()

    @property
    def trusts_bitmap(self) -> bool:
        """Whether the device's bitmap counts: bit 7, and no poisoning of freed pages.

        `virtballoon_validate` clears the bit in a guest that poisons; this asks the guest again,
        for the case that the two are ever out of step.
        """
        return Feature.DEVICE_INIT_ON_INFLATE in self._features and not self._mm.config.page_poisoning

    def fill_balloon(self, num: int) -> int:
        """Put up to `num` pages into the balloon in one request of at most 256; return how many."""
        pfns = self._balloon_page_alloc(min(num, ARRAY_PFNS_MAX))
        if len(pfns) == 0:
            return 0
        with self._balloon_lock():
            self._mm.balloon.enqueue(pfns)
            self.num_pages += len(pfns)
            self._adjust_managed(-len(pfns))
            zeroed = self._tell_inflate(pfns)
            if zeroed.any():
                self._mm.balloon.set_zeroed(pfns, zeroed)
        return len(pfns)

    def leak_balloon(self, num: int) -> int:
        """Take up to `num` pages out of the balloon in one request of at most 256; return how many.

        Raises:
            HostzeroError: the device did not take the request; the pages stay in the balloon.
        """
        with self._balloon_lock():
            pfns = self._mm.balloon.dequeue(min(num, ARRAY_PFNS_MAX, self.num_pages))
            if len(pfns) == 0:
                return 0
            try:
                self.tell_host(self._deflate, pfns)
            except (HostzeroError, OSError):
                self._mm.balloon.enqueue(pfns)
                raise
            self._release_pages_balloon(pfns)
        return len(pfns)

    def abandon(self) -> None:
        """Empty the balloon without telling: the device was reset and owns nothing any more.

        Known-zero marks stand: the device gave them while it answered, and nobody in the guest
        has touched those pages since.

        Raises:
            DriverError: pages are missing from the list, off it for compaction.
        """
        while self.num_pages:
            pfns = self._mm.balloon.dequeue(self.num_pages)
            if len(pfns) == 0:
                raise DriverError(f"{self.num_pages} balloon pages are gone from the balloon's list")
            self._release_pages_balloon(pfns)

    def tell_host(self, queue: BalloonQueue, pfns: Pfns, *, bitmap: bool = False) -> int:
        """Send one request and wait for its answer; return the used length in bytes.

        With `bitmap` the buffer for the device's answer is appended, zeroed.
        """
        token = next(self._tokens)
        out = [self._buffers.put_pfns(pfns)]
        in_ = [self._buffers.clear_bitmap(len(pfns))] if bitmap else []
        # There is always room in an empty queue: one request at a time is under the lock.
        queue.add(out, in_, token)
        return queue.complete({token})[token]

    def virtballoon_migratepage(self, newpage: Pfn, page: Pfn) -> bool:
        """Tell the host that `newpage` takes the place of `page` in the balloon.

        The caller owns both list entries: it puts `newpage` on the balloon's list, marks it zero
        if this returns True, and releases `page` with whatever mark it has, after this returned
        (patch 37).

        Returns:
            Whether the device has shown `newpage` to be zero.

        Raises:
            BlockingIOError: the balloon is busy; try later (kernel: -EAGAIN).
        """
        if self.locked:
            raise BlockingIOError("the balloon is busy with another request (-EAGAIN)")
        with self._balloon_lock():
            zeroed = self._tell_inflate(as_pfns(newpage))
            self.tell_host(self._deflate, as_pfns(page))
        return bool(zeroed[0])

    def _tell_inflate(self, pfns: Pfns) -> Mask:
        bitmap = Feature.DEVICE_INIT_ON_INFLATE in self._features
        used_len = self.tell_host(self._inflate, pfns, bitmap=bitmap)
        if not (bitmap and self.trusts_bitmap):
            return np.zeros(len(pfns), dtype=np.bool_)
        return trusted_pages(self._buffers.bitmap(len(pfns)), used_len, len(pfns))

    def _balloon_page_alloc(self, num: int) -> Pfns:
        # Outside the lock, as in the kernel: an allocation may run the OOM notifier, which wants it.
        try:
            return self._mm.alloc_pages_bulk(BALLOON_GFP, num)
        except OutOfMemory:
            _log.info("out of puff: cannot get %d pages", num)
            return as_pfns()

    def _release_pages_balloon(self, pfns: Pfns) -> None:
        self.num_pages -= len(pfns)
        self._adjust_managed(len(pfns))
        self._mm.balloon.release(pfns)

    def _adjust_managed(self, pages: int) -> None:
        # With DEFLATE_ON_OOM the guest can have the pages back, so they still count as its RAM.
        if Feature.DEFLATE_ON_OOM not in self._features:
            self._mm.adjust_managed_page_count(pages)

    @contextmanager
    def _balloon_lock(self) -> Iterator[None]:
        if self.locked:
            raise DriverError("the balloon is busy with another request")
        self.locked = True
        try:
            yield
        finally:
            self.locked = False
