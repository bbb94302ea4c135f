# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting: telling a host which free blocks it may drop.

Kernel: `mm/page_reporting.c`, Linux 7.2, with patches 4 (capacity), 22 and 24 (zeroed
bitmap) and 29 (flush). The pass over the free lists is compiled; the device's
`report` is called between its steps, with the zone lock released as in the kernel.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hostzero.errors import HostzeroError, MmError, UsageError, VmBug
from hostzero.jit import compiled
from hostzero.mm.buddy import (
    PAGE_REPORTING_ACTIVE,
    PAGE_REPORTING_IDLE,
    PAGE_REPORTING_REQUESTED,
    buddy_order,
)
from hostzero.mm.cachealias import discard_kernel_lines
from hostzero.mm.fallback import ALLOC_CMA
from hostzero.mm.kstrtox import UINT_MAX, kstrtouint
from hostzero.mm.list import list_empty, list_first, list_next, list_rotate_to_front
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_ISOLATE,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    PAGEBLOCK_ORDER,
    Memory,
    free_list,
)
from hostzero.mm.page_flags import PageBuddy, PageReported, __SetPageReported, __SetPageZeroed
from hostzero.mm.page_isolation import __isolate_free_page, __putback_isolated_page
from hostzero.mm.watermark import __zone_watermark_ok
from hostzero.units import Pfn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hostzero.clock import Clock

PAGE_REPORTING_CAPACITY = 32
PAGE_REPORTING_DELAY = 2.0  # seconds

_log = logging.getLogger(__name__)

# What page_reporting_fill stopped for.
_LIST_DONE = 0
_BATCH_FULL = 1


@dataclass
class PageReportingDevInfo:
    """A device that wants to hear of free blocks (kernel: `struct page_reporting_dev_info`).

    Attributes:
        report: called with the blocks of one batch as `(pfn, order)`; raises on failure.
            It fills `zeroed_bitmap` for exactly these entries.
        capacity: how many blocks one call can take; 0 or more than 32 becomes 32 (patch 4).
        order: the smallest order to report; negative or too large means pageblock order.
        host_zeroes_pages: whether set bits of the bitmap may be believed (patch 22).
        zeroed_bitmap: entry i is True if the host says that the i-th block of the list
            passed to *this* call now reads as zero (patch 24).
    """

    report: Callable[[Sequence[tuple[Pfn, int]]], None]
    capacity: int = 0
    order: int = -1
    host_zeroes_pages: bool = False
    zeroed_bitmap: NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(PAGE_REPORTING_CAPACITY, dtype=np.bool_)
    )


@compiled
def page_reporting_fill(
    mem: Memory, zone: int, order: int, migratetype: int, sg_pfn: object, sg_order: object, cursor: object
) -> int:
    """Isolate unreported blocks of one list into the batch, from its end towards index 0.

    Source: the loop of `page_reporting_cycle`, up to where it drops the zone lock.
    `cursor` holds the batch's offset and the list's budget. Returns `_BATCH_FULL` when
    another unreported block was met with the batch full (that block is first on the list
    now), else `_LIST_DONE`.
    """
    head = free_list(mem, zone, order, migratetype)
    pfn = list_first(mem, head)
    stopped_at = head
    result = _LIST_DONE
    while pfn != head:
        following = list_next(mem, pfn)
        if PageReported(mem, pfn):
            pfn = following
            continue
        if cursor[1] < 0:  # type: ignore[index]
            mem.vm[0].page_reporting_state = PAGE_REPORTING_REQUESTED
            stopped_at = pfn
            break
        if cursor[0] == 0:  # type: ignore[index]
            stopped_at = pfn
            result = _BATCH_FULL
            break
        if not __isolate_free_page(mem, pfn, order):
            stopped_at = pfn
            break
        cursor[0] -= 1  # type: ignore[index]
        sg_pfn[cursor[0]] = pfn  # type: ignore[index]
        sg_order[cursor[0]] = order  # type: ignore[index]
        pfn = following
    if stopped_at != head and list_first(mem, head) != stopped_at:
        list_rotate_to_front(mem, stopped_at, head)
    return result


@compiled
def page_reporting_drain(
    mem: Memory, sg_pfn: object, sg_order: object, start: int, end: int, reported: bool, zeroed: object
) -> None:
    """Put a batch back and mark what the host said about it.

    Source: same name; patches 22 and 24. `zeroed[i]` belongs to entry `start + i`. A block
    that merged on its way back is neither reported nor known zero: the claim was about
    the smaller block. The mark is set after the block is back, when it is known whether it
    merged (series-internal order unknown; setting it before would let it merge).
    """
    host_zeroes = mem.vm[0].page_reporting_host_zeroes != 0
    for i in range(start, end):
        pfn = sg_pfn[i]  # type: ignore[index]
        order = sg_order[i]  # type: ignore[index]
        __putback_isolated_page(mem, pfn, order)
        if not reported:
            continue
        if PageBuddy(mem, pfn) and buddy_order(mem, pfn) == order:
            __SetPageReported(mem, pfn)
            if host_zeroes and zeroed[i - start]:  # type: ignore[index]
                __SetPageZeroed(mem, pfn)
                if mem.vm[0].cpu_dcache_aliasing != 0:
                    discard_kernel_lines(mem, pfn, 1 << order)


@compiled
def page_reporting_zone_ready(mem: Memory, zone: int, capacity: int, order: int) -> bool:
    """Return whether a zone can spare a batch (kernel: head of `page_reporting_process_zone`)."""
    mark = mem.zone[zone].watermark_low + (capacity << order)
    return __zone_watermark_ok(mem, zone, 0, mark, 0, ALLOC_CMA)


@compiled
def page_reporting_list_empty(mem: Memory, zone: int, order: int, migratetype: int) -> bool:
    """Return whether one free list has no block at all."""
    return list_empty(mem, free_list(mem, zone, order, migratetype))


class PageReporting:
    """The reporting state machine of one guest.

    States are the kernel's: IDLE, REQUESTED, ACTIVE. A free of a large block requests a
    pass; a request in state IDLE queues it two seconds ahead on the guest's clock.
    """

    def __init__(self, mem: Memory, clock: Clock) -> None:
        """Start with no device registered."""
        self._mem = mem
        self._prdev: PageReportingDevInfo | None = None
        self._work = clock.delayed_work(self.process)
        self._seen_requests = 0
        self._passing = False
        self._flushing = False  # kernel_param_lock
        self.report_calls = 0
        self.reported_blocks = 0
        self.failed_calls = 0
        self._sg_pfn = np.zeros(PAGE_REPORTING_CAPACITY, dtype=np.int64)
        self._sg_order = np.zeros(PAGE_REPORTING_CAPACITY, dtype=np.int64)
        self._cursor = np.zeros(2, dtype=np.int64)
        clock.before_advance(self._queue_requested)

    @property
    def state(self) -> int:
        """The word of the state machine: IDLE, REQUESTED or ACTIVE."""
        return int(self._mem.vm[0].page_reporting_state)

    @property
    def order(self) -> int:
        """The smallest order that is reported; meaningful while a device is registered."""
        return int(self._mem.vm[0].page_reporting_order)

    @order.setter
    def order(self, order: int) -> None:
        """Report blocks from this order on (kernel: the module parameter `page_reporting_order`).

        Like the kernel's, it may be written at any time; the next pass obeys it.

        Raises:
            UsageError: the order is not between 0 and MAX_PAGE_ORDER.
        """
        if not 0 <= order <= MAX_PAGE_ORDER:
            raise UsageError(f"page_reporting_order {order}: must be from 0 to {MAX_PAGE_ORDER}")
        self._mem.vm[0].page_reporting_order = order

    def register(self, prdev: PageReportingDevInfo) -> None:
        """Register the one device and request a first pass (kernel: `page_reporting_register`).

        Raises:
            MmError: a device is registered already (-EBUSY in the kernel).
        """
        if self._prdev is not None:
            raise MmError("page reporting has a device already: unregister it first")
        if not 0 < prdev.capacity <= PAGE_REPORTING_CAPACITY:
            prdev.capacity = PAGE_REPORTING_CAPACITY
        vm = self._mem.vm[0]
        vm.page_reporting_order = prdev.order if 0 <= prdev.order <= MAX_PAGE_ORDER else PAGEBLOCK_ORDER
        self._prdev = prdev
        vm.page_reporting_host_zeroes = int(prdev.host_zeroes_pages)
        vm.page_reporting_state = PAGE_REPORTING_IDLE
        vm.page_reporting_enabled = 1
        self._request()

    def unregister(self, prdev: PageReportingDevInfo) -> None:
        """Forget a device; blocks keep what is known of them (kernel: same name).

        The claim of an earlier report stays true after its device has gone: only a write
        by an owner could break it, and every owner takes the mark off first. The static
        key stays on, as in Linux: it is what clears `PG_reported` when a block leaves its
        list, and an alias of `PG_uptodate` must not reach an owner.
        """
        if self._prdev is not prdev:
            return
        self._work.cancel()
        vm = self._mem.vm[0]
        self._prdev = None
        vm.page_reporting_host_zeroes = 0
        vm.page_reporting_state = PAGE_REPORTING_IDLE

    def param_set_flush(self, text: str, signal_pending: Callable[[], bool] = lambda: False) -> None:
        """Write to `/sys/module/page_reporting/parameters/flush`, as `echo 512 >` does (patch 29).

        Raises:
            OSError: the text is no unsigned int (EINVAL, ERANGE), or as `flush`.
            MmError: as `flush`.
        """
        self.flush(kstrtouint(text), signal_pending)

    def flush(self, budget: int, signal_pending: Callable[[], bool] = lambda: False) -> int:
        """Report now, until `budget` blocks were reported or none is left (patch 29).

        Each round runs pending work, requests, and runs again: a request made while a pass
        is queued would otherwise be absorbed by it. May overshoot, since a pass covers all
        zones. Returns how many blocks were reported; 0 without a device, which the sources
        leave open: there is nothing to wait for.

        The budget is in blocks: the cover letter's 512 are all of a guest of 2 GiB as blocks,
        and a single block as pages of 4 KiB. Larger numbers than the parameter can hold are
        refused, not clamped, as `kstrtouint` does.

        Raises:
            ValueError: the budget is not an unsigned int of 32 bits.
            InterruptedError: a signal is pending (-EINTR).
            MmError: a device calls this from its own `report`. The parameter's lock, or the pass
                that would be waited for, is its caller's: the kernel would wait for ever.
        """
        if not 0 <= budget <= UINT_MAX:
            raise ValueError(f"the flush budget is an unsigned number up to {UINT_MAX}, not {budget}")
        if self._flushing or self._passing:
            raise MmError("page reporting is flushed from inside a report: a deadlock")
        start = self.reported_blocks
        self._flushing = True
        try:
            while self._prdev is not None and self.reported_blocks - start < budget:
                if signal_pending():
                    raise InterruptedError(errno.EINTR, "a signal interrupted the flush")
                before = self.reported_blocks
                self._flush_work()
                self._request()
                self._flush_work()
                if self.reported_blocks == before:
                    # Two whole passes without progress: nothing is left, or the device fails.
                    break
        finally:
            self._flushing = False
        return self.reported_blocks - start

    def process(self) -> None:
        """Run one pass over all zones (kernel: `page_reporting_process`).

        Work does not run beside itself: called from inside a report (guest time moved there),
        it asks for another pass after this one.
        """
        prdev = self._prdev
        if prdev is None:
            return
        vm = self._mem.vm[0]
        if self._passing:
            vm.page_reporting_state = PAGE_REPORTING_REQUESTED
            return
        self._passing = True
        vm.page_reporting_state = PAGE_REPORTING_ACTIVE
        try:
            for zone in range(len(self._mem.zone)):
                if not self._process_zone(prdev, zone):
                    break
        finally:
            self._passing = False
            # Also when a defect of the driver ends the pass: left ACTIVE, no request would count.
            if self.state == PAGE_REPORTING_ACTIVE:
                vm.page_reporting_state = PAGE_REPORTING_IDLE
            elif self.state == PAGE_REPORTING_REQUESTED:
                self._work.schedule(PAGE_REPORTING_DELAY)

    def _flush_work(self) -> None:
        self._queue_requested()
        self._work.flush()

    def _request(self) -> None:
        # __page_reporting_request: only a change from IDLE queues work.
        vm = self._mem.vm[0]
        if vm.page_reporting_state == PAGE_REPORTING_IDLE:
            vm.page_reporting_requests += 1
        vm.page_reporting_state = PAGE_REPORTING_REQUESTED
        self._queue_requested()

    def _queue_requested(self) -> None:
        # Compiled frees count their requests; here is where they become delayed work.
        requests = int(self._mem.vm[0].page_reporting_requests)
        if requests != self._seen_requests:
            self._seen_requests = requests
            if self._prdev is not None:
                self._work.schedule(PAGE_REPORTING_DELAY)

    def _process_zone(self, prdev: PageReportingDevInfo, zone: int) -> bool:
        mem, order_min = self._mem, self.order
        if not page_reporting_zone_ready(mem, zone, prdev.capacity, order_min):
            return True
        self._cursor[0] = prdev.capacity
        for order in range(order_min, NR_PAGE_ORDERS):
            for migratetype in range(MIGRATE_TYPES):
                if migratetype == MIGRATE_ISOLATE:
                    continue
                if not self._cycle(prdev, zone, order, migratetype):
                    return False
        offset = int(self._cursor[0])
        if offset < prdev.capacity:
            return self._report(prdev, offset, prdev.capacity)
        return True

    def _cycle(self, prdev: PageReportingDevInfo, zone: int, order: int, migratetype: int) -> bool:
        mem = self._mem
        if page_reporting_list_empty(mem, zone, order, migratetype):
            return True
        nr_free = int(mem.zone[zone].nr_free[order])
        # A sixteenth of the blocks of this order a pass, so that reporting stays in the background.
        self._cursor[1] = -(-nr_free // (prdev.capacity * 16))
        while (
            page_reporting_fill(mem, zone, order, migratetype, self._sg_pfn, self._sg_order, self._cursor)
            == _BATCH_FULL
        ):
            good = self._report(prdev, 0, prdev.capacity)
            self._cursor[0] = prdev.capacity
            self._cursor[1] -= 1
            if not good:
                return False
        return True

    def _report(self, prdev: PageReportingDevInfo, start: int, end: int) -> bool:
        """Report entries [start, end) of the batch and put them back; False on an error."""
        entries = [(Pfn(int(self._sg_pfn[i])), int(self._sg_order[i])) for i in range(start, end)]
        prdev.zeroed_bitmap[:] = False
        self.report_calls += 1
        good = False
        try:
            prdev.report(entries)
            good = True
            self.reported_blocks += len(entries)
        except VmBug:
            raise  # a failed assertion of the guest is no failing device
        except (HostzeroError, OSError) as error:
            self.failed_calls += 1
            _log.warning("page reporting: the device failed: %s", error)
        finally:
            if self._prdev is not prdev:
                # Gone in the middle of its own report; whose promise would be drained now?
                prdev.zeroed_bitmap[:] = False
            # Whatever happened, isolated blocks go back: nothing is lost.
            page_reporting_drain(
                self._mem, self._sg_pfn, self._sg_order, start, end, good, prdev.zeroed_bitmap
            )
        return good and self._prdev is prdev
