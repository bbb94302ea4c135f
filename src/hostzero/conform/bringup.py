# SPDX-License-Identifier: GPL-2.0-only
"""A driver as far as DRIVER_OK: connections, negotiation, queues, reset.

The order is that of virtio 1.3, 3.1.1. `hostzero.conform.rig.Rig` sends requests on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from hostzero.conform.guest_ram import GuestRam
from hostzero.conform.judge import Judge, NotApplicable
from hostzero.conform.rings import CarefulRing, RawRing
from hostzero.conform.target import Ability, Connection, Target
from hostzero.errors import DeviceError
from hostzero.virtio.balloon import CONFIG_POISON_VAL
from hostzero.virtio.features import Feature, QueueRole, names, queue_roles
from hostzero.virtio.transport import Status, Transport

ANSWER_SECONDS: Final = 5.0
"""How long a request may take; a device that has not answered by then is not going to."""

QUIET_SECONDS: Final = 0.25
"""How long a device is watched for something that must not happen."""

RING_SIZE: Final = 128
"""The entries of a ring, unless the device has room for fewer or the case wants others."""

USUAL: Final = (
    Feature.MUST_TELL_HOST
    | Feature.STATS_VQ
    | Feature.DEFLATE_ON_OOM
    | Feature.FREE_PAGE_HINT
    | Feature.REPORTING
    | Feature.DEVICE_INIT_REPORTED
    | Feature.DEVICE_INIT_ON_INFLATE
    | Feature.RING_EVENT_IDX
    | Feature.VERSION_1
)
"""What a case accepts of what is offered unless it says otherwise: as Linux, with bits 6 and 7."""

NOTHING: Final = Feature(0)

STARTED: Final = Status.ACKNOWLEDGE | Status.DRIVER
"""The status before FEATURES_OK."""


class Bringup:
    """One device and its driver, up to DRIVER_OK.

    Attributes:
        judge: takes the expectations.
        ram: guest memory; there from `connect` on.
        accepted: the features of the last `start`.
        rings: the careful rings by role.
        raw: the raw rings by role.
        config_changes: configuration change notifications so far.
    """

    def __init__(self, target: Target, judge: Judge) -> None:
        """Know where devices come from; none is made yet."""
        self.target = target
        self.judge = judge
        self.accepted = NOTHING
        self.rings: dict[QueueRole, CarefulRing] = {}
        self.raw: dict[QueueRole, RawRing] = {}
        self.config_changes = 0
        self._offered: Feature | None = None
        self._exit = ExitStack()
        self._connection: Connection | None = None
        self._ram: GuestRam | None = None

    # ------------------------------------------------------------------ connections

    def connect(self) -> None:
        """Take a fresh device, the old one being closed first."""
        self.close()
        self._connection = self._exit.enter_context(self.target.connect())
        self._ram = GuestRam(self._connection)
        self._connection.transport.on_config_change(self._on_config_change)

    def close(self) -> None:
        """Let the device go; what was expected of memory is no longer checked."""
        for ring in self.rings.values():
            ring.release()
        if self._ram is not None:
            self._ram.close()
        self._connection = None
        self._ram = None
        self._offered = None
        self.rings, self.raw = {}, {}
        self._exit.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connection(self) -> Connection:
        """The device at hand."""
        assert self._connection is not None, "connect() comes first"
        return self._connection

    @property
    def transport(self) -> Transport:
        """The device as its driver reaches it."""
        return self.connection.transport

    @property
    def ram(self) -> GuestRam:
        """Guest memory."""
        assert self._ram is not None, "connect() comes first"
        return self._ram

    def need(self, *abilities: Ability) -> None:
        """End the case as not applicable if the target lacks one of them.

        Raises:
            NotApplicable: with the target's own reason.
        """
        for ability in abilities:
            if ability in self.connection.missing:
                raise NotApplicable(self.connection.missing[ability])

    def can(self, ability: Ability) -> bool:
        """Return whether the target has an ability."""
        return ability not in self.connection.missing

    # ------------------------------------------------------------------ starting and stopping

    def offered(self) -> Feature:
        """Return what the device offers, noticing it first as a driver does."""
        if self._offered is None:
            self.transport.set_status(int(Status.ACKNOWLEDGE))
            self.transport.set_status(int(STARTED))
            self._offered = Feature(self.transport.device_features())
        return self._offered

    def negotiate(self, features: Feature) -> bool:
        """Write features and FEATURES_OK; return whether the device goes along."""
        self.judge.transcript.sent(f"accept {', '.join(names(features)) or 'no feature'}")
        self.transport.set_driver_features(int(features))
        self.transport.set_status(int(STARTED | Status.FEATURES_OK))
        held = bool(self.transport.status() & Status.FEATURES_OK)
        if not held:
            self.judge.transcript.came("FEATURES_OK reads as clear")
        return held

    def start(
        self,
        accept: Feature | None = None,
        *,
        drop: Feature = NOTHING,
        raw: Collection[QueueRole] = (),
        sizes: Mapping[QueueRole, int] | None = None,
        poison: int | None = None,
        before_ok: Callable[[], None] = lambda: None,
        insist: bool = True,
    ) -> bool:
        """Bring the device up to DRIVER_OK; return whether it went along.

        Args:
            accept: the features, exactly; the default is what is offered of `USUAL`.
            drop: features to leave out of the default.
            raw: queues that get a `RawRing`.
            sizes: entries of rings, where the case cares.
            poison: a value for `poison_val`.
            before_ok: runs when the queues are there and DRIVER_OK is not.
            insist: fail the case if the device refuses the features.

        Raises:
            Failed: the device refuses the features.
        """
        offered = self.offered()
        features = (offered & USUAL & ~drop) if accept is None else accept
        if not self.negotiate(features):
            self.judge.must(
                not insist,
                f"the device refuses {', '.join(names(features))}, all of which it offers",
                "2.2.2",
            )
            return False
        self.accepted = features
        self.set_up_queues(queue_roles(features), raw, sizes or {})
        if poison is not None:
            self.judge.transcript.sent(f"poison_val = {poison:#x}")
            self.transport.write_config(CONFIG_POISON_VAL, poison.to_bytes(4, "little"))
        before_ok()
        self.transport.set_status(int(STARTED | Status.FEATURES_OK | Status.DRIVER_OK))
        self.judge.transcript.sent("DRIVER_OK")
        return True

    def set_up_queues(
        self, roles: Sequence[QueueRole], raw: Collection[QueueRole], sizes: Mapping[QueueRole, int]
    ) -> None:
        """Make a ring for each queue and hand it to the device."""
        self.rings, self.raw = {}, {}
        event_idx = Feature.RING_EVENT_IDX in self.accepted
        for index, role in enumerate(roles):
            most = self.transport.queue_size_max(index)
            self.judge.must(most > 0, f"queue {index}, for {role.value}, does not exist", "5.5.2")
            layout = self.ram.ring(min(sizes.get(role, RING_SIZE), most))

            def notify(index: int = index) -> None:
                self.transport.notify(index)

            ring: CarefulRing | RawRing
            if role in raw:
                ring = self.raw[role] = RawRing(role, index, self.ram.memory, layout, notify)
            else:
                ring = self.rings[role] = CarefulRing(
                    role, index, self.ram.memory, layout, event_idx=event_idx, notify=notify, judge=self.judge
                )
            self.transport.setup_queue(index, layout, ring.interrupt)

    def reset(self) -> None:
        """Reset the device; the rings are gone.

        Raises:
            Failed: its status does not become 0.
        """
        self.judge.transcript.sent("reset")
        self.transport.set_status(0)
        self.judge.must(
            self.connection.settle(lambda: self.transport.status() == 0, ANSWER_SECONDS),
            f"after a reset the status reads {self.transport.status():#x}",
            "2.4.1",
        )
        self._offered = None
        self.rings, self.raw = {}, {}

    def renew(self) -> None:
        """Have a device that is ready for `start`, by a reset or by another connection.

        Buffers and rings from before are used again.
        """
        if self.can(Ability.RESET):
            self.reset()
            self.ram.rewind()
        else:
            self.judge.transcript.sent("connect anew")
            self.connect()

    # ------------------------------------------------------------------ what it does

    def settle(self, until: Callable[[], bool], timeout: float = ANSWER_SECONDS) -> bool:
        """Let the device run until something holds; return whether it does."""
        return self.connection.settle(until, timeout)

    def quiet(self) -> None:
        """Let the device do what it is not to do."""
        self.connection.settle(lambda: False, QUIET_SECONDS)

    def needs_reset(self) -> bool:
        """Return whether the device asks to be reset."""
        return bool(self.transport.status() & Status.NEEDS_RESET)

    def state(self) -> str:
        """Return what is known of the device, for a message."""
        if not self.connection.alive():
            return "the device went away"
        try:
            return f"its status reads {self.transport.status():#x}"
        except DeviceError as error:
            return f"its status cannot be read: {error}"

    def _on_config_change(self) -> None:
        self.config_changes += 1
        self.judge.transcript.came("configuration change notification")
