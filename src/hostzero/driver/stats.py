# SPDX-License-Identifier: GPL-2.0-only
"""Memory statistics for the host (kernel: `update_balloon_stats`, `stats_handle_request`).

The queue works in reverse: the driver hands over one buffer at probe, the device keeps it
until it wants fresh numbers, and returning it is the request.
"""

from __future__ import annotations

from typing import Final

from hostzero.driver.buffers import DriverBuffers
from hostzero.driver.guest_mm import GuestMm, VmStats
from hostzero.driver.queues import BalloonQueue
from hostzero.units import PAGE_SHIFT
from hostzero.virtio.balloon import StatTag, pack_stats

_TOKEN: Final = "stats"


def update_balloon_stats(stats: VmStats) -> list[tuple[StatTag, int]]:
    """Return the statistics in the kernel's order; sizes in bytes, the rest in events.

    The guest has no page cache and no reclaim, so those counters are truly zero. The
    two hugetlb tags are left out, as by a kernel without hugetlb: nobody counts them.
    """
    return [
        (StatTag.SWAP_IN, stats.pswpin << PAGE_SHIFT),
        (StatTag.SWAP_OUT, stats.pswpout << PAGE_SHIFT),
        (StatTag.MAJFLT, stats.pgmajfault),
        (StatTag.MINFLT, stats.pgfault),
        (StatTag.OOM_KILL, stats.oom_kill),
        (StatTag.ALLOC_STALL, stats.allocstall),
        (StatTag.ASYNC_SCAN, 0),
        (StatTag.DIRECT_SCAN, 0),
        (StatTag.ASYNC_RECLAIM, 0),
        (StatTag.DIRECT_RECLAIM, 0),
        (StatTag.MEMFREE, stats.free_pages << PAGE_SHIFT),
        (StatTag.MEMTOT, stats.total_pages << PAGE_SHIFT),
        (StatTag.AVAIL, stats.available_pages << PAGE_SHIFT),
        (StatTag.CACHES, 0),
    ]


class StatsQueue:
    """The statistics queue and its one buffer."""

    def __init__(self, mm: GuestMm, buffers: DriverBuffers, queue: BalloonQueue) -> None:
        self._mm = mm
        self._buffers = buffers
        self._queue = queue

    def prime(self) -> None:
        """Hand over the first buffer, for the device to keep until it asks.

        Raises:
            HostzeroError: the device breaks a rule of the ring.
        """
        self._submit()
        self._queue.kick()

    def stats_handle_request(self) -> bool:
        """Refill the buffer if the device returned it; False if it did not.

        An interrupt without a buffer changes nothing: the numbers still belong to the device,
        and rewriting them would tear what it is reading.

        Raises:
            HostzeroError: the device breaks a rule of the ring.
        """
        if not self._queue.poll():
            return False
        self._submit()
        self._queue.kick()
        return True

    def _submit(self) -> None:
        stats = pack_stats(update_balloon_stats(self._mm.vm_stats()))
        self._queue.add([self._buffers.put_stats(stats)], [], _TOKEN)
