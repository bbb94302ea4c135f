# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting to the host (kernel: `virtballoon_free_page_report`; patches 4, 24, 27, 31).

Each free block of a batch is one device-writable buffer of its own, and one kick covers the
batch. The used length of a buffer is the number of bytes that the device has initialised, and
a block is known to be zero only if that is the block's whole length. One buffer for the batch
would give the sum, and the sum of a full and a failed discard names neither (patch 27).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count

from hostzero.driver.guest_mm import GuestMm, ReportEntries
from hostzero.driver.queues import BalloonQueue
from hostzero.errors import DriverError, RingError
from hostzero.mm.page_reporting import PageReportingDevInfo
from hostzero.units import PAGE_SIZE, pfn_to_gpa
from hostzero.virtio.features import Feature
from hostzero.virtio.ring_layout import Segment


class FreePageReporting:
    """The reporting queue, tied to the memory manager's reporting device.

    Attributes:
        pr_dev_info: what the memory manager calls; `zeroed_bitmap[i]` of it is the answer for
            the i-th block of the list passed to the last call.
    """

    def __init__(
        self,
        mm: GuestMm,
        queue: BalloonQueue,
        features: Feature,
        device_in_use: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Describe the device to the memory manager; registering it is the caller's.

        Args:
            mm: asked for poisoning each time, in addition to `virtballoon_validate`.
            queue: the reporting queue; its size is the capacity of a batch (patch 4).
            features: as acknowledged.
            device_in_use: entered around a report; raises if the device cannot take one now
                (frozen, failed).
        """
        self._mm = mm
        self._queue = queue
        self._features = features
        self._device_in_use = device_in_use
        self._tokens = count()
        self.pr_dev_info = PageReportingDevInfo(
            report=self.virtballoon_free_page_report,
            capacity=queue.size,
            host_zeroes_pages=self.trusts_used_length,
        )

    @property
    def trusts_used_length(self) -> bool:
        """Whether a used length is evidence: bit 6, and no poisoning of freed pages.

        Without bit 6 a length says nothing: devices exist that return the buffer's length
        whether they discarded or not.
        """
        return Feature.DEVICE_INIT_REPORTED in self._features and not self._mm.config.page_poisoning

    def resume(self, queue: BalloonQueue) -> None:
        """Go on with the queue of a restored device, whose ring may be smaller."""
        self._queue = queue
        self.pr_dev_info.capacity = min(self.pr_dev_info.capacity, queue.size)

    def virtballoon_free_page_report(self, entries: ReportEntries) -> None:
        """Report the blocks (first page, order) of one batch and learn which are zero.

        Raises:
            DriverError: the batch is larger than the answer has room for, or the device is not
                to be used now or did not answer.
            RingError: a block did not fit into the ring. Those before it were waited for, and
                none of the batch counts as zero.
        """
        zeroed = self.pr_dev_info.zeroed_bitmap
        zeroed[:] = False
        if len(entries) > len(zeroed):
            raise DriverError(f"a batch of {len(entries)} blocks, with room for {len(zeroed)} answers")
        with self._device_in_use():
            lengths, used = self._submit_and_wait(entries)
        if self.trusts_used_length:
            for position, (token, length) in enumerate(lengths.items()):
                zeroed[position] = used[token] == length

    def _submit_and_wait(self, entries: ReportEntries) -> tuple[dict[object, int], dict[object, int]]:
        # Returns, by token and in the order of the entries, each block's length and its used length.
        lengths: dict[object, int] = {}
        refused: RingError | None = None
        for pfn, order in entries:
            token = next(self._tokens)
            length = PAGE_SIZE << order
            try:
                self._queue.add([], [Segment(pfn_to_gpa(pfn), length)], token)
            except RingError as error:
                refused = error
                break
            lengths[token] = length
        # Also after a refusal: until the device has answered, the blocks that it got are not ours.
        used = self._queue.complete(lengths) if lengths else {}
        if refused is not None:
            raise refused
        return lengths, used
