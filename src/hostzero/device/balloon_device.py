# SPDX-License-Identifier: GPL-2.0-only
"""The balloon device: status, features, queues, and the requests of the host.

The device is its own transport (`hostzero.virtio.transport.Transport`): a driver in the same
process calls it directly, and a vhost-user session calls it for a driver far away. It has no
socket, no thread and no clock. Calls may nest, since an interrupt can run the driver, which
notifies again; calls from several threads may not overlap.

Two kinds of wrongness are kept apart. What a guest writes into a ring is never an exception:
the request is returned with used length 0, counted and logged. A call out of order, such as a
queue set up before FEATURES_OK, raises `DeviceError` and changes nothing. The device goes on in
both cases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from hostzero.device.byte_ranges import ByteRanges, ring_segments
from hostzero.device.config import DeviceConfig
from hostzero.device.discard import Discarder
from hostzero.device.hint import FreePageHintQueue, HintStatus
from hostzero.device.inflate import DeflateQueue, InflateQueue
from hostzero.device.metrics import BalloonMetrics
from hostzero.device.negotiation import negotiate
from hostzero.device.partial_pages import PartialPages
from hostzero.device.queue_server import LOG_LINES_MAX, QueueServer
from hostzero.device.reporting import ReportingQueue
from hostzero.device.state import DeviceState, QueueHandler
from hostzero.device.stats import StatsQueue
from hostzero.errors import DeviceError, RingError
from hostzero.ram import GuestMemory
from hostzero.virtio.balloon import StatTag
from hostzero.virtio.device_queue import DeviceQueue
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.ring_layout import RingLayout
from hostzero.virtio.transport import Status

_log = logging.getLogger(__name__)

PAGES_MAX: Final = 0xFFFF_FFFF
"""The largest target: `num_pages` is a le32."""

_DRIVER_BITS: Final = (
    Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
)


class BalloonDevice:
    """A virtio-balloon device over guest memory.

    Attributes:
        config: what it offers.
        metrics: its counters; `hostzero.device.metrics` explains them.
    """

    def __init__(self, memory: GuestMemory, config: DeviceConfig | None = None) -> None:
        """Make a device that no driver has touched; nothing of `memory` is read or written yet."""
        self.config = DeviceConfig() if config is None else config
        self._state = DeviceState(Discarder(memory))
        self.metrics: BalloonMetrics = self._state.metrics
        partial = PartialPages()
        self._stats = StatsQueue(self._state)
        self._wanted = 0  # the target before it is cut to what memory there is
        self._hint = FreePageHintQueue(self._state, discard=self.config.discard_hints)
        self._handlers: dict[QueueRole, QueueHandler] = {
            QueueRole.INFLATE: InflateQueue(self._state, partial),
            QueueRole.DEFLATE: DeflateQueue(self._state, partial),
            QueueRole.STATS: self._stats,
            QueueRole.FREE_PAGE: self._hint,
            QueueRole.REPORTING: ReportingQueue(self._state),
        }
        self._status = Status(0)
        self._driver_features = Feature(0)
        self._queues: dict[int, QueueServer] = {}
        self._config_changed: Callable[[], None] | None = None

    # ------------------------------------------------------------------ the driver's calls

    def device_features(self) -> int:
        """Return the feature bits that the device offers."""
        return int(self.config.offered)

    def set_driver_features(self, features: int) -> None:
        """Take the feature bits that the driver accepts; they count from FEATURES_OK on.

        Raises:
            DeviceError: FEATURES_OK is set already (virtio 1.3, 3.1.1), or it is no set of
                64 bits.
        """
        if Status.FEATURES_OK in self._status:
            raise DeviceError("features cannot change after FEATURES_OK; reset the device first")
        if not 0 <= features < 1 << 64:
            raise DeviceError(f"{features:#x} is no set of 64 feature bits")
        self._driver_features = Feature(features)

    def status(self) -> int:
        """Return the device status; FEATURES_OK reads as clear if the features were refused."""
        return int(self._status)

    def set_status(self, status: int) -> None:
        """Write the device status (virtio 1.3, 2.1); 0 resets.

        FEATURES_OK stays clear if the features are refused (`hostzero.device.negotiation`).
        DRIVER_OK serves every queue once: buffers may be there before the first notification.

        Raises:
            DeviceError: a bit is unknown or would be cleared (2.1.1), or DRIVER_OK comes before
                FEATURES_OK was set and read back (3.1.1). The status is as it was.
        """
        if status == 0:
            self.reset()
            return
        if status & ~int(_DRIVER_BITS | Status.NEEDS_RESET):
            raise DeviceError(f"status {status:#x} has bits that virtio 1.3, 2.1 does not define")
        # NEEDS_RESET is the device's: whatever a driver writes there changes nothing.
        wanted = Status(status) & _DRIVER_BITS
        before = self._status & _DRIVER_BITS
        if before & ~wanted:
            raise DeviceError(
                f"status {status:#x} clears bits of {int(before):#x}; only a reset does (2.1.1)"
            )
        added = wanted & ~before
        if Status.DRIVER_OK in added and Status.FEATURES_OK not in before:
            raise DeviceError("DRIVER_OK before FEATURES_OK was set and read back (3.1.1)")
        if Status.FEATURES_OK in added:
            if negotiate(self.config.offered, self._driver_features, self.metrics):
                self._state.acked = self._driver_features
            else:
                wanted &= ~Status.FEATURES_OK
        self._status = wanted | (self._status & Status.NEEDS_RESET)
        if Status.DRIVER_OK in added:
            for server in list(self._queues.values()):
                server.serve()

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the configuration space (`hostzero.virtio.balloon.CONFIG`).

        Raises:
            DeviceError: the range is not inside its 16 bytes.
        """
        return self._state.space.read(offset, length, self._hint.cmd_id)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take `actual`, and `poison_val` where it is allowed, from a write to any part.

        `poison_val` is writable if PAGE_POISON is offered and the driver has accepted it or has
        not decided yet: Linux writes it before the features reach a vhost-user device.

        Raises:
            DeviceError: the range is not inside the 16 bytes; nothing was taken.
        """
        undecided = Status.FEATURES_OK not in self._status
        poison_writable = Feature.PAGE_POISON in (self.config.offered if undecided else self._state.acked)
        self._state.space.write(offset, data, poison_writable=poison_writable)

    def queue_size_max(self, index: int) -> int:
        """Return the most entries of queue `index`; 0 if there is no such queue.

        Queues are numbered over the accepted features, so there is none before FEATURES_OK.
        """
        role = self.queue_role(index)
        return 0 if role is None else self.config.queue_size(role)

    def setup_queue(
        self,
        index: int,
        layout: RingLayout,
        interrupt: Callable[[], None],
        *,
        start_index: int = 0,
        late: bool = False,
    ) -> None:
        """Take over the ring of queue `index`; `interrupt` is called for used buffers.

        Args:
            index: the queue, numbered over the accepted features.
            layout: its ring.
            interrupt: tells the driver that buffers were used.
            start_index: other than 0 only for a ring that is resumed (vhost-user:
                SET_VRING_BASE).
            late: allow it after DRIVER_OK: a vhost-user front end starts rings one by one. The
                caller then serves the queue, which may hold buffers already.

        Raises:
            DeviceError: not between FEATURES_OK and DRIVER_OK (virtio 1.3, 3.1.1), no such
                queue, set up already, or larger than `queue_size_max`.
        """
        if Status.FEATURES_OK not in self._status or (Status.DRIVER_OK in self._status and not late):
            raise DeviceError(f"queue {index} can be set up only between FEATURES_OK and DRIVER_OK (3.1.1)")
        role = self.queue_role(index)
        if role is None:
            raise DeviceError(f"there is no queue {index} with the features that were accepted")
        if index in self._queues:
            raise DeviceError(f"queue {index} ({role.value}) is set up already")
        most = self.config.queue_size(role)
        if layout.size > most:
            raise DeviceError(f"queue {index} ({role.value}) has at most {most} entries, not {layout.size}")
        queue = DeviceQueue(
            self._state.discarder.memory,
            layout,
            event_idx=Feature.RING_EVENT_IDX in self._state.acked,
            interrupt=interrupt,
            start_index=start_index,
        )
        self._queues[index] = QueueServer(
            role, queue, self._handlers[role], self.metrics.queues[role], self._on_broken
        )
        self._find_rings()

    def notify(self, index: int) -> None:
        """Serve queue `index` until it is empty; whatever its ring holds, this does not raise.

        A notification out of the queue's own interrupt returns at once: the call that is
        under way goes on until nothing is left.

        Raises:
            DeviceError: the device is not between DRIVER_OK and reset, or the queue was not
                set up.
        """
        self.serve(index)

    def serve(self, index: int, budget: int | None = None) -> bool:
        """Serve queue `index` as `notify` does, but answer at most `budget` requests.

        Returns:
            Whether the budget ran out: then call again, a notification need not come.

        Raises:
            DeviceError: as `notify`.
        """
        if not self.live:
            raise DeviceError(f"queue {index} was notified, but no driver is running (virtio 1.3, 2.1.1)")
        if index not in self._queues:
            raise DeviceError(f"queue {index} was notified and is not set up")
        return self._queues[index].serve(budget)

    def stop_queue(self, index: int) -> int:
        """Let go of queue `index` and return the index at which it can be set up again.

        That is vhost-user's GET_VRING_BASE. A request that the device keeps, such as a
        statistics buffer, becomes available again in the ring. The features stay.

        Raises:
            DeviceError: the queue is not set up.
        """
        server = self._queues.get(index)
        if server is None:
            raise DeviceError(f"queue {index} is not set up")
        while True:
            held = self._stats.take_held() if server.role is QueueRole.STATS else None
            try:
                server.queue.rewind()
            except RingError:
                # A later buffer was returned before the held one, so going back would pop it twice.
                if held is not None:
                    server.give_back(held)
                    # The driver may have answered by another buffer, or by a reset.
                    continue
            break
        self._handlers[server.role].stopped()
        last_avail = server.queue.last_avail
        server.queue.release()
        if self._queues.get(index) is server:
            del self._queues[index]
            self._find_rings()
        return last_avail

    def suspend(self) -> None:
        """Stop every queue and forget the features, but keep what the driver wrote.

        Over vhost-user a paused guest looks like a driver that was removed, and only the first
        expects `actual` and `poison_val` to be there when it goes on. Both may be kept: the
        next driver writes them itself, and until then a poison value only prevents discards.
        """
        while self._queues:
            self.stop_queue(next(iter(self._queues)))
        self._state.acked = self._driver_features = Feature(0)
        self._status = Status(0)

    def broken(self, index: int) -> str | None:
        """Return why queue `index` was given up; None if it was not, or is not set up."""
        server = self._queues.get(index)
        return None if server is None or server.queue.broken is None else str(server.queue.broken)

    def on_config_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when the configuration space changes; it replaces the last one."""
        self._config_changed = callback

    # ------------------------------------------------------------------ the host's calls

    @property
    def live(self) -> bool:
        """Whether a driver is running: DRIVER_OK is set and it has not given up."""
        return Status.DRIVER_OK in self._status and Status.FAILED not in self._status

    @property
    def acked(self) -> Feature:
        """The features that were negotiated; none before FEATURES_OK."""
        return self._state.acked

    @property
    def target(self) -> int:
        """The pages of 4 KiB that the host wants in the balloon."""
        return self._state.space.num_pages

    @property
    def actual(self) -> int:
        """The pages of 4 KiB that the driver says are in the balloon."""
        return self._state.space.actual

    @property
    def poison_val(self) -> int:
        """The value that free pages hold in the guest; it counts only with PAGE_POISON accepted."""
        return self._state.space.poison_val

    @property
    def stats(self) -> dict[StatTag, int]:
        """The latest statistics by tag, as the guest sent them; empty before the first."""
        return dict(self._stats.latest)

    @property
    def hint_status(self) -> HintStatus:
        """Where free page hinting stands."""
        return self._hint.status

    @property
    def inhibited(self) -> bool:
        """Whether discards are forbidden at present."""
        return self._state.discarder.inhibited

    def set_target(self, pages: int) -> None:
        """Ask for `pages` pages of 4 KiB in the balloon.

        A running driver is told at once. Otherwise the number waits: the driver reads it when
        it starts, and a configuration change before DRIVER_OK crashes QEMU 11.1 over
        vhost-user.

        Raises:
            DeviceError: it is negative, more than guest RAM, or more than 32 bits.
        """
        if not 0 <= pages <= self._most:
            raise DeviceError(f"a target of {pages} pages is not between 0 and {self._most}")
        self._state.space.num_pages = self._wanted = pages
        # Also if it is the old one: a driver that ran out of memory on the way tries again.
        self._announce_config()

    # A vhost-user session has a target before it has memory (SET_MEM_TABLE).
    @property
    def _most(self) -> int:
        spans = self._state.discarder.spans
        return min(sum(span.end - span.first for span in spans), PAGES_MAX) if spans else PAGES_MAX

    def request_stats(self) -> bool:
        """Ask for fresh statistics; False if the device holds no buffer with which to ask."""
        server = next((each for each in self._queues.values() if each.role is QueueRole.STATS), None)
        head = self._stats.take_held() if server is not None and self.live else None
        if server is None or head is None:
            return False
        server.give_back(head)
        return True

    def hint_start(self) -> int:
        """Start a run of free page hinting and return its command id.

        Raises:
            DeviceError: no driver is running, or it did not accept FREE_PAGE_HINT.
        """
        self._need_hinting()
        self._hint.start()
        cmd_id = self._hint.cmd_id
        self._announce_config()
        return cmd_id

    def hint_stop(self) -> None:
        """End a run; the driver keeps the pages it has hinted until `hint_done`.

        Raises:
            DeviceError: as `hint_start`.
        """
        self._need_hinting()
        self._hint.stop()
        self._announce_config()

    def hint_done(self) -> None:
        """End a run and let the guest have its hinted pages back.

        Raises:
            DeviceError: as `hint_start`.
        """
        self._need_hinting()
        self._hint.done()
        self._announce_config()

    def inhibit_discard(self, reason: str) -> None:
        """Forbid discards, and so claims, as long as `reason` stands (postcopy, VFIO).

        Each call needs an `allow_discard` of the same reason. The reasons outlive a reset.
        """
        self._state.discarder.inhibit(reason)

    def allow_discard(self, reason: str) -> None:
        """Take back one `inhibit_discard`.

        Raises:
            DeviceError: this reason does not stand.
        """
        self._state.discarder.allow(reason)

    def set_memory(self, memory: GuestMemory) -> None:
        """Serve another guest memory (vhost-user: SET_MEM_TABLE comes after the features).

        Raises:
            DeviceError: queues are set up, whose rings lie in the old memory.
        """
        if self._queues:
            raise DeviceError("guest memory cannot change under queues that are set up; reset first")
        self._state.discarder.use(memory)
        # The target may be older than this memory: set for the guest before, or for none.
        pages = min(self._wanted, self._most)
        if pages != self._state.space.num_pages:
            self._state.space.num_pages = pages
            self._announce_config()

    def reset(self) -> None:
        """Drop queues, held buffers, features, poison value, and what is in the balloon.

        The target, the reasons that inhibit discards and the metrics stay: they are the host's.
        """
        self.metrics.resets += 1
        for server in self._queues.values():
            server.queue.release()
        self._queues = {}
        self._find_rings()
        for handler in self._handlers.values():
            handler.reset()
        self._state.space.reset()
        self._state.acked = self._driver_features = Feature(0)
        self._status = Status(0)

    def queue_role(self, index: int) -> QueueRole | None:
        """Return what queue `index` is for; None if there is no such queue (yet)."""
        if Status.FEATURES_OK not in self._status:
            return None
        roles = queue_roles(self._state.acked)
        return roles[index] if 0 <= index < len(roles) else None

    def last_avail(self, index: int) -> int:
        """Return the next available index of a queue, as vhost-user's GET_VRING_BASE asks.

        Raises:
            DeviceError: the queue is not set up.
        """
        if index not in self._queues:
            raise DeviceError(f"queue {index} is not set up")
        return self._queues[index].queue.last_avail

    # ------------------------------------------------------------------ inside

    def _need_hinting(self) -> None:
        if not self.live or Feature.FREE_PAGE_HINT not in self._state.acked:
            raise DeviceError("free page hinting needs a running driver that accepted FREE_PAGE_HINT")

    def _announce_config(self) -> None:
        if self.live and self._config_changed is not None:
            self.metrics.config_changes += 1
            self._config_changed()

    def _find_rings(self) -> None:
        layouts = [server.queue.layout for server in self._queues.values()]
        self._state.rings = ByteRanges(part for layout in layouts for part in ring_segments(layout))

    # The ring cannot be trusted any more (2.1.2). Its requests are lost until a reset; the other
    # queues go on.
    def _on_broken(self, server: QueueServer, error: RingError) -> None:
        self.metrics.broken_queues += 1
        if server not in self._queues.values():
            # What came before it went back first, and the driver answered that by a reset.
            return
        if self.metrics.broken_queues <= LOG_LINES_MAX:
            _log.warning("the %s queue is given up until a reset: %s", server.role.value, error)
        self._status |= Status.NEEDS_RESET
        self._announce_config()
