# SPDX-License-Identifier: GPL-2.0-only
"""The rings of one session: started, served a few requests at a time, and stopped.

What a hostile guest can make this cost is bounded. A ring is served `REQUESTS_PER_TURN` requests
at a time, and the loop looks after everybody else in between; whatever asks for a turn, one waits in
the loop at most. Notifications are counted by the kernel, so any number of them is one event. A
driver that notifies for nothing `IDLE_KICKS_MAX` times in a row is not listened to for some
milliseconds, and then again at its next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from hostzero.device import BalloonDevice
from hostzero.errors import HostzeroError, MessageError
from hostzero.vhost_user.announcer import Announcer
from hostzero.vhost_user.connection import Fd
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.protocol import ErrorKind
from hostzero.vhost_user.vring import Vring
from hostzero.virtio.features import QueueRole
from hostzero.virtio.transport import Status

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics

_log = logging.getLogger(__name__)

QUEUES_MAX: Final = len(QueueRole)
"""Queues of a session. QEMU names as many as it was told to make, with or without a role."""
REQUESTS_PER_TURN: Final = 8
"""Requests of one queue that are answered before everybody else has a turn."""
IDLE_KICKS_MAX: Final = 64
"""Notifications for nothing in a row, after which a queue's are left unread for a moment."""

STARTING: Final = int(Status.ACKNOWLEDGE | Status.DRIVER)
FEATURES_OK: Final = STARTING | int(Status.FEATURES_OK)
DRIVER_OK: Final = FEATURES_OK | int(Status.DRIVER_OK)


class Loop(Protocol):
    """What a session needs of the loop in which it runs."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is readable."""
        ...

    def unwatch(self, fd: int) -> None:
        """Do so no more; nothing happens if it was not watched."""
        ...

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in the next turn, after everybody else."""
        ...

    def later(self, callback: Callable[[], None]) -> None:
        """Call back after a rest, some milliseconds."""
        ...


class Rings:
    """Every ring of a session, and guest memory, in which they lie.

    Attributes:
        vrings: the rings by their index.
        table: guest memory; None before SET_MEM_TABLE.
        features: the virtio features that the front end has accepted; None before.
        implicit_enable: whether a kick alone starts a ring (without PROTOCOL_FEATURES).
    """

    def __init__(
        self, device: BalloonDevice, loop: Loop, metrics: ServiceMetrics, announcer: Announcer
    ) -> None:
        """Serve `device`; `announcer` may tell while rings run."""
        self.vrings = [Vring(index) for index in range(QUEUES_MAX)]
        self.table: MappedTable | None = None
        self.features: int | None = None
        self.implicit_enable = False
        self._device = device
        self._loop = loop
        self._metrics = metrics
        self._announcer = announcer

    @property
    def running(self) -> bool:
        """Whether any ring runs."""
        return any(vring.running for vring in self.vrings)

    def vring(self, index: int) -> Vring:
        """Return a ring.

        Raises:
            MessageError: there is none of this index.
        """
        if index >= len(self.vrings):
            raise MessageError(ErrorKind.MALFORMED, f"there is no queue {index}, only 0 to {QUEUES_MAX - 1}")
        return self.vrings[index]

    def stopped(self, index: int) -> Vring:
        """Return a ring that does not run.

        Raises:
            MessageError: there is none of this index, or it runs.
        """
        vring = self.vring(index)
        if vring.running:
            raise MessageError(ErrorKind.ORDER, f"queue {index} runs: stop it first")
        return vring

    def negotiate(self, features: int) -> None:
        """Have the device accept features; it has no queue then.

        Raises:
            MessageError: it does not; then it has accepted none.
        """
        device = self._device
        self.features = None
        if device.status():
            device.suspend()
        device.set_status(STARTING)
        device.set_driver_features(features)
        device.set_status(FEATURES_OK)
        if device.status() != FEATURES_OK:
            device.suspend()
            raise MessageError(
                ErrorKind.FEATURES,
                f"features {features:#x}: not offered, or without VERSION_1 "
                f"(offered are {device.device_features():#x})",
            )
        self.features = features

    def remap(self, table: MappedTable) -> None:
        """Go over to another table, which is taken over; rings that run go on where they were.

        Raises:
            MessageError: a ring does not lie in the new memory; it was stopped.
        """
        running = [vring for vring in self.vrings if vring.running]
        for vring in running:
            self._quiet(vring)
            vring.base = self._device.stop_queue(vring.index)
        self._device.set_memory(table.memory)
        if self.table is not None:
            self.table.close()
        self.table = table
        failed: MessageError | None = None
        for vring in running:
            try:
                self._start(vring)
            except MessageError as error:
                failed = failed or error
        if running and not self.running:
            self._all_stopped()
        if failed is not None:
            raise failed

    def enable(self, index: int, value: bool) -> None:
        """Enable or disable a ring, which starts or stops it.

        Raises:
            MessageError: it cannot start as it was described; it stays disabled.
        """
        vring = self.vring(index)
        vring.enabled = value
        if not value:
            self.stop(vring)
            return
        try:
            self._start_if_due(vring)
        except MessageError:
            vring.enabled = False
            raise

    def use_kick(self, vring: Vring, kick: Fd) -> None:
        """Take over what the driver's notifications arrive on, which starts a ring that is enabled.

        Raises:
            MessageError: it cannot start as it was described; the descriptor is closed.
        """
        if vring.kick is not None:
            self._loop.unwatch(vring.kick.fileno())
            vring.drop_kick()
        vring.kick = kick
        vring.resting = False
        if vring.running:
            self._listen(vring)
            self._serve_soon(vring)
            return
        try:
            self._start_if_due(vring)
        except MessageError:
            vring.drop_kick()
            raise

    def use_call(self, vring: Vring, call: Fd | None) -> None:
        """Take over what the driver is notified on; None if it is not to be."""
        if vring.call is not None:
            vring.call.close()
        vring.call = call
        if vring.running and vring.signalled:
            # The last signal may have gone to the descriptor that nobody listens to any more.
            self._interrupt(vring)

    def stop(self, vring: Vring) -> None:
        """Stop a ring; `base` is where it goes on. One that does not run is left as it is."""
        if not vring.running:
            return
        self._announcer.shut()
        self._quiet(vring)
        vring.base = self._device.stop_queue(vring.index)
        _log.info("queue %d stops at index %d", vring.index, vring.base)
        if not self.running:
            self._all_stopped()

    def stop_all(self) -> None:
        """Stop and disable every ring."""
        for vring in self.vrings:
            self.stop(vring)
            vring.enabled = False

    def close(self) -> None:
        """Stop every ring, close its descriptors, and unmap guest memory."""
        self.stop_all()
        for vring in self.vrings:
            vring.close()

    # ------------------------------------------------------------------ starting and stopping

    def _start_if_due(self, vring: Vring) -> None:
        if vring.running or vring.kick is None or not (vring.enabled or self.implicit_enable):
            return
        self._start(vring)

    def _start(self, vring: Vring) -> None:
        device = self._device
        if self.features is None:
            raise MessageError(ErrorKind.ORDER, f"queue {vring.index} cannot start before SET_FEATURES")
        layout = vring.layout(self.table)
        if not device.status() & Status.FEATURES_OK:
            # The rings were stopped, and start again with the features that they had.
            self.negotiate(self.features)
        role = device.queue_role(vring.index)
        if role is None:
            raise MessageError(
                ErrorKind.RING, f"queue {vring.index} has no role with the features that were accepted"
            )
        first = not device.live
        if first:
            device.set_status(DRIVER_OK)
        try:
            device.setup_queue(
                vring.index, layout, lambda: self._interrupt(vring), start_index=vring.base, late=True
            )
        except HostzeroError as error:
            if first:
                device.suspend()
            raise MessageError(ErrorKind.RING, str(error)) from error
        vring.running = True
        vring.role = role
        vring.broken = vring.signalled = False
        vring.idle_kicks = 0
        self._announcer.open()
        _log.info("queue %d (%s) runs from index %d on", vring.index, role.value, vring.base)
        self._listen(vring)
        self._serve_soon(vring)

    def _quiet(self, vring: Vring) -> None:
        if vring.kick is not None:
            self._loop.unwatch(vring.kick.fileno())
        vring.running = vring.resting = False

    def _all_stopped(self) -> None:
        self._announcer.shut()
        self._device.suspend()

    # ------------------------------------------------------------------ serving

    def _listen(self, vring: Vring) -> None:
        if vring.kick is not None:
            self._loop.watch(vring.kick.fileno(), lambda: self._kicked(vring))

    def _kicked(self, vring: Vring) -> None:
        vring.take_kick()
        self._metrics.kicks += 1
        if vring.scheduled or not vring.running:
            return
        if self._serve(vring):
            vring.idle_kicks = 0
            return
        self._metrics.empty_kicks += 1
        vring.idle_kicks += 1
        if vring.idle_kicks >= IDLE_KICKS_MAX and vring.kick is not None:
            vring.resting = True
            self._loop.unwatch(vring.kick.fileno())
            self._loop.later(lambda: self._rested(vring))

    def _rested(self, vring: Vring) -> None:
        if vring.resting and vring.running:
            vring.resting = False
            self._listen(vring)

    # However often a front end starts a ring or sends a kick, one turn of it waits in the loop. A turn
    # outlives a stop: it finds the ring stopped, or running again and not yet looked at.
    def _serve_soon(self, vring: Vring) -> None:
        if not vring.scheduled:
            vring.scheduled = True
            self._loop.soon(lambda: self._again(vring))

    def _again(self, vring: Vring) -> None:
        vring.scheduled = False
        if vring.running:
            self._serve(vring)

    # Whether there was anything to do.
    def _serve(self, vring: Vring) -> bool:
        role = vring.role
        assert role is not None, "a ring that runs has a role"
        metrics = self._device.metrics.queues[role]
        before = metrics.requests
        more = self._device.serve(vring.index, REQUESTS_PER_TURN)
        if not vring.broken and (why := self._device.broken(vring.index)):
            vring.broken = True
            _log.warning("queue %d (%s) is broken until it is stopped: %s", vring.index, role.value, why)
            vring.report_broken()
        if more:
            self._serve_soon(vring)
        return metrics.requests != before

    def _interrupt(self, vring: Vring) -> None:
        self._metrics.calls += vring.interrupt()
