# SPDX-License-Identifier: GPL-2.0-only
"""One queue being served: requests out of the ring, answers into it, each exactly once.

When a claim is published it is true. So an inflate request is published before the next one is
served, because the bitmap of the next one could lie in a page that this one dropped; reported
buffers, between which the device writes nothing but rings, are published together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from hostzero.device.metrics import QueueMetrics
from hostzero.device.state import QueueHandler
from hostzero.errors import HostzeroError, RingError
from hostzero.virtio.chain import BadChain, Chain
from hostzero.virtio.device_queue import DeviceQueue
from hostzero.virtio.features import QueueRole

_log = logging.getLogger(__name__)

LOG_LINES_MAX: Final = 16
"""Log lines about one kind of misbehaviour in the device's life; the metrics count all of it.
A guest misbehaves as often as it likes, and the log is the host's disk."""


class QueueServer:
    """A queue between its set-up and the reset.

    Attributes:
        role: what the queue carries.
        queue: its ring.
    """

    def __init__(
        self,
        role: QueueRole,
        queue: DeviceQueue,
        handler: QueueHandler,
        metrics: QueueMetrics,
        on_broken: Callable[[QueueServer, RingError], None],
    ) -> None:
        """Serve `queue` by `handler`; `on_broken` hears of a ring that cannot be trusted."""
        self.role = role
        self.queue = queue
        self._handler = handler
        self._metrics = metrics
        self._on_broken = on_broken
        self._serving = False
        self._notified = False

    def serve(self, budget: int | None = None) -> bool:
        """Answer requests until none is left; whatever the guest wrote, this does not raise.

        A call from within the queue's own interrupt returns at once: the call under way looks
        again before it ends. After a reset there is nothing to serve.

        Args:
            budget: requests to answer at most, 1 or more, for a caller that has others to look
                after; None answers all, and a guest that goes on asking keeps the caller here.

        Returns:
            Whether the budget ran out. Then the caller has to come back: the driver need not
            notify for what is left.
        """
        self._notified = True
        if self._serving:
            return False
        self._serving = True
        try:
            while self._notified:
                self._notified = False
                budget = self._drain(budget)
                if budget == 0:
                    return True
        finally:
            self._serving = False
        return False

    def give_back(self, head: int) -> None:
        """Return a buffer that the handler kept, with used length 0."""
        self.queue.push(head, 0)
        self._publish()

    # Returns what is left of the budget.
    def _drain(self, budget: int | None) -> int | None:
        while budget != 0 and (item := self._pop()) is not None:
            self._metrics.requests += 1
            self._answer(item)
            if self.role is QueueRole.INFLATE:
                self._publish()
            if budget is not None:
                budget -= 1
        self._publish()
        return budget

    def _pop(self) -> Chain | BadChain | None:
        try:
            return self.queue.pop()
        except RingError as error:
            self._handler.refused()
            # What came before it goes back first: the driver may answer by a reset.
            self._publish()
            self._on_broken(self, error)
            return None

    # Every popped head is pushed exactly once, whatever becomes of its request; only the
    # statistics queue keeps one, and gives it back later.
    def _answer(self, item: Chain | BadChain) -> None:
        used_len: int | None = 0
        try:
            if isinstance(item, BadChain):
                raise item.error
            used_len = self._handler.handle(item)
        except (HostzeroError, OSError) as error:
            self._refuse(error)
        finally:
            if used_len is not None:
                self.queue.push(item.head, used_len)

    def _refuse(self, error: Exception) -> None:
        self._metrics.malformed += 1
        self._handler.refused()
        if self._metrics.malformed <= LOG_LINES_MAX:
            last = "; more of these are only counted" * (self._metrics.malformed == LOG_LINES_MAX)
            _log.warning("malformed request on the %s queue: %s%s", self.role.value, error, last)

    # A driver that reset the device from an earlier interrupt has no queue any more; then
    # everything was published before, and there is nothing to do.
    def _publish(self) -> None:
        if self.queue.flush():
            self._metrics.interrupts += 1
