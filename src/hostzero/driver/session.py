# SPDX-License-Identifier: GPL-2.0-only
"""What a driver has between `init_vqs` and `del_vqs`: queues, buffers, and who uses them.

A frozen driver has none of it; a restored one has all of it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hostzero.driver.buffers import DriverBuffers
from hostzero.driver.config_space import ConfigSpace
from hostzero.driver.free_page_hint import FreePageHint
from hostzero.driver.guest_mm import GuestMm
from hostzero.driver.inflate import Inflation
from hostzero.driver.queues import BalloonQueue, Broken, Wait, del_vqs, find_vqs
from hostzero.driver.stats import StatsQueue
from hostzero.errors import HostzeroError
from hostzero.ram import GuestMemory
from hostzero.virtio.features import Feature, QueueRole
from hostzero.virtio.transport import Transport


@dataclass(frozen=True)
class Session:
    """One binding of a driver to a running device.

    Attributes:
        buffers: the driver's page.
        queues: every queue by its role.
        inflation: the balloon.
        stats: the statistics, if STATS_VQ was negotiated.
        hint: free page hinting, if FREE_PAGE_HINT was negotiated.
    """

    buffers: DriverBuffers
    queues: dict[QueueRole, BalloonQueue]
    inflation: Inflation
    stats: StatsQueue | None
    hint: FreePageHint | None

    def free(self, mm: GuestMm) -> None:
        """Give back every page: the balloon's, the hinted blocks, the rings, the buffers.

        The device must have been reset: until then it may write to any of them.

        Raises:
            DriverError: the balloon's list is short of pages (`Inflation.abandon`).
        """
        self.inflation.abandon()
        if self.hint is not None:
            self.hint.return_free_pages_to_mm()
        del_vqs(mm, self.queues)
        self.buffers.free()


def init_vqs(
    mm: GuestMm,
    memory: GuestMemory,
    transport: Transport,
    features: Feature,
    *,
    stats_interrupt: Callable[[], None],
    wait: Wait,
    broken: Broken,
) -> Session:
    """Make the queues that `features` bring and what sits on them (kernel: `init_vqs`).

    The features must have been accepted, since they decide which queues there are.

    Raises:
        DriverError, OutOfMemory, OSError: as `find_vqs`; no page is left allocated then.
    """
    buffers = DriverBuffers(mm, memory)
    try:
        queues = find_vqs(
            mm,
            memory,
            transport,
            features,
            interrupts={QueueRole.STATS: stats_interrupt},
            wait=wait,
            broken=broken,
        )
    except (HostzeroError, OSError):
        buffers.free()
        raise
    stats, hint = queues.get(QueueRole.STATS), queues.get(QueueRole.FREE_PAGE)
    return Session(
        buffers,
        queues,
        Inflation(mm, buffers, queues[QueueRole.INFLATE], queues[QueueRole.DEFLATE], features),
        StatsQueue(mm, buffers, stats) if stats else None,
        FreePageHint(mm, buffers, hint, ConfigSpace(transport)) if hint else None,
    )
