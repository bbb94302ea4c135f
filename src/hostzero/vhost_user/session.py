# SPDX-License-Identifier: GPL-2.0-only
"""One connection's state machine: what each request does, and when it may come.

::

      connect            SET_OWNER          SET_FEATURES           a ring starts
    ----------> CONNECTED ---------> OWNED --------------> NEGOTIATED ----------> RUNNING
                                       ^                     |  ^  |                 |
                                       |   RESET_DEVICE, or  |  |  +--+ SET_FEATURES |
                                       |   features refused  |  |     |  (again)      |
                                       +---------------------+  +-----+              |
                                       |                        ^                    |
                                       |                        +--------------------+
                                       |  RESET_DEVICE            the last ring stops
                                       +---------------------------------------------+
      any state -- the peer closes, or its framing is broken --> CLOSED

A request that comes too early or too late changes nothing and is refused. Before SET_OWNER only
those are served that QEMU sends first: GET_FEATURES, GET_ and SET_PROTOCOL_FEATURES,
GET_QUEUE_NUM, SET_BACKEND_REQ_FD, and GET_CONFIG.

How a refusal is told: a request that asks for something gets a reply without payload, so that
the front end does not wait for ever; any other gets a 1 if it wanted an acknowledgement
(REPLY_ACK). Both are counted by `ErrorKind` and logged.

What QEMU does that the specification does not say, and what is done about it here:

- It starts the driver's rings after the driver has filled them: each is scanned when it starts.
- It repeats SET_VRING_CALL on running rings: the new descriptor replaces the old one, and is
  signalled once if the old one was used, since that signal may have been lost.
- It enables every queue that it was told of, also those without a role: these do not start.
- It cannot take CONFIG_CHANGE while no driver runs (its notifier follows a null pointer), so
  that is sent only from the first ring's start to the first ring's stop.
- It stops all rings for a paused guest as for a removed driver, and says nothing else. What the
  driver wrote to the configuration space survives that, and a target that moved meanwhile is
  announced when the rings run again.
- It lets the guest write `poison_val` before it sends SET_FEATURES: taken, and kept.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, cast

from hostzero.device import BalloonDevice
from hostzero.errors import HostzeroError, MessageError
from hostzero.ram import GuestMemory
from hostzero.vhost_user.backend_channel import BackendChannel
from hostzero.vhost_user.connection import Fd, Message
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    REPLY_PAYLOADS,
    U64,
    Config,
    ErrorKind,
    Header,
    MemTable,
    Payload,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFd,
    VringState,
    name_of,
    parse_request,
)
from hostzero.vhost_user.vring import Vring, eventfd
from hostzero.virtio.balloon import CONFIG
from hostzero.virtio.features import QueueRole
from hostzero.virtio.transport import Status

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics

_log = logging.getLogger(__name__)

QUEUES_MAX: Final = len(QueueRole)
"""Queues of a session. QEMU names as many as it was told to make, with or without a role."""

OFFERED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
)
"""The protocol features that are implemented, and so offered."""

REQUESTS_PER_TURN: Final = 8
"""Requests of one queue that are answered before everybody else has a turn."""
IDLE_KICKS_MAX: Final = 64
"""Notifications for nothing in a row, after which a queue's are left unread for a moment."""
LOG_LINES_MAX: Final = 16
"""Log lines about refused messages in one session; the counters count all of them."""

_STARTING: Final = int(Status.ACKNOWLEDGE | Status.DRIVER)
_FEATURES_OK: Final = _STARTING | int(Status.FEATURES_OK)
_DRIVER_OK: Final = _FEATURES_OK | int(Status.DRIVER_OK)


class SessionState(enum.Enum):
    """Where a session stands; the module's docstring draws it."""

    CONNECTED = "connected"
    OWNED = "owned"
    NEGOTIATED = "negotiated"
    RUNNING = "running"
    CLOSED = "closed"


_ANY: Final = frozenset(SessionState) - {SessionState.CLOSED}
_OWNED: Final = _ANY - {SessionState.CONNECTED}
_DUE: Final[dict[Request, frozenset[SessionState]]] = {
    Request.GET_FEATURES: _ANY,
    Request.GET_PROTOCOL_FEATURES: _ANY,
    Request.SET_PROTOCOL_FEATURES: _ANY - {SessionState.RUNNING},
    Request.GET_QUEUE_NUM: _ANY,
    Request.SET_BACKEND_REQ_FD: _ANY,
    Request.GET_CONFIG: _ANY,
    Request.SET_OWNER: frozenset({SessionState.CONNECTED}),
}
# Every other request is due from SET_OWNER on.


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


class Session:
    """A connection's state, between its first message and its end.

    Attributes:
        state: where it stands.
        acked_protocol: the protocol features that the front end has accepted.
        features: the virtio features that it has accepted, without bit 30; None before.
        vrings: every ring, by its index.
        table: guest memory; None before SET_MEM_TABLE.
    """

    def __init__(self, device: BalloonDevice, loop: Loop, metrics: ServiceMetrics) -> None:
        """Serve `device`, which no other session serves."""
        self.state = SessionState.CONNECTED
        self.acked_protocol = ProtocolFeature(0)
        self.features: int | None = None
        self.vrings = [Vring(index) for index in range(QUEUES_MAX)]
        self.table: MappedTable | None = None
        self._device = device
        self._loop = loop
        self._metrics = metrics
        self._channel: BackendChannel | None = None
        self._implicit_enable = True
        self._window = False
        self._told: bytes | None = None
        self._logged = 0
        device.on_config_change(self._announce)

    # ------------------------------------------------------------------ messages

    def handle(self, message: Message) -> bytes | None:
        """Do what a message asks and return the payload of the reply; None if none is due.

        Whatever the message is, this does not raise; its descriptors are taken or closed.
        """
        header = message.header
        self._metrics.messages += 1
        with message:
            try:
                payload = parse_request(header, message.payload, len(message.fds))
                request = Request(header.request)
                self._check_due(request)
                answer = _HANDLERS[request](self, payload, message.take_fds())
            except (HostzeroError, OSError) as error:
                return self.refuse(header, error)
        if answer is not None:
            return answer.pack()
        return U64(0).pack() if self._wants_ack(header) else None

    def refuse(self, header: Header, error: Exception) -> bytes | None:
        """Count and log a message that cannot be served; return the reply that says so."""
        kind = ErrorKind(error.kind) if isinstance(error, MessageError) else ErrorKind.RING
        self._metrics.errors[kind] += 1
        self._logged += 1
        if self._logged <= LOG_LINES_MAX:
            _log.warning("%s refused (%s): %s", name_of(header.request), kind.value, error)
        if header.request in REPLY_PAYLOADS:
            return b""
        return U64(1).pack() if self._wants_ack(header) else None

    def _wants_ack(self, header: Header) -> bool:
        return header.need_reply and ProtocolFeature.REPLY_ACK in self.acked_protocol

    def _check_due(self, request: Request) -> None:
        if self.state not in _DUE.get(request, _OWNED):
            raise MessageError(ErrorKind.ORDER, f"it is not due in the state {self.state.value!r}")
        needed = _NEEDS.get(request)
        if needed is not None and needed not in self.acked_protocol:
            raise MessageError(ErrorKind.ORDER, f"the protocol feature {needed.name} was not accepted")

    # ------------------------------------------------------------------ features and ownership

    def _get_features(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(self._device.device_features() | F_PROTOCOL_FEATURES)

    def _set_features(self, payload: U64, _fds: list[Fd]) -> None:
        features = payload.value & ~F_PROTOCOL_FEATURES
        if self.state is SessionState.RUNNING:
            if features != self.features:
                raise MessageError(ErrorKind.ORDER, "features cannot change while rings run")
            return
        self._implicit_enable = not payload.value & F_PROTOCOL_FEATURES
        self.features = None
        self.state = SessionState.OWNED
        self._negotiate(features)
        self.features = features
        self.state = SessionState.NEGOTIATED

    def _negotiate(self, features: int) -> None:
        device = self._device
        if device.status():
            device.suspend()
        device.set_status(_STARTING)
        device.set_driver_features(features)
        device.set_status(_FEATURES_OK)
        if device.status() != _FEATURES_OK:
            device.suspend()
            raise MessageError(
                ErrorKind.FEATURES,
                f"features {features:#x}: not offered, or without VERSION_1 "
                f"(offered are {device.device_features():#x})",
            )

    def _get_protocol_features(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(int(OFFERED))

    def _set_protocol_features(self, payload: U64, _fds: list[Fd]) -> None:
        unknown = payload.value & ~int(OFFERED)
        if unknown:
            raise MessageError(ErrorKind.FEATURES, f"protocol features {unknown:#x} were not offered")
        self.acked_protocol = ProtocolFeature(payload.value)

    def _get_queue_num(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(QUEUES_MAX)

    def _set_owner(self, _payload: Payload, _fds: list[Fd]) -> None:
        self.state = SessionState.OWNED

    # Deprecated: "use it to disable all rings" is what the specification recommends.
    def _reset_owner(self, _payload: Payload, _fds: list[Fd]) -> None:
        for vring in self.vrings:
            self._stop(vring)
            vring.enabled = False

    def _reset_device(self, _payload: Payload, _fds: list[Fd]) -> None:
        self._reset_owner(_payload, _fds)
        self._device.reset()
        for vring in self.vrings:
            vring.base = 0
        self.features = None
        self.state = SessionState.OWNED

    def _set_backend_req_fd(self, _payload: Payload, fds: list[Fd]) -> None:
        channel = BackendChannel(fds[0], self._metrics)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    # ------------------------------------------------------------------ memory

    def _set_mem_table(self, payload: MemTable, fds: list[Fd]) -> None:
        try:
            table = MappedTable(payload, [fd.fileno() for fd in fds])
        finally:
            for fd in fds:
                fd.close()
        # Guest memory can grow while rings run: they go on in the new mapping where they were.
        running = [vring for vring in self.vrings if vring.running]
        for vring in running:
            vring.base = self._device.stop_queue(vring.index)
        self._device.set_memory(table.memory)
        if self.table is not None:
            self.table.close()
        self.table = table
        failed: MessageError | None = None
        for vring in running:
            self._quiet(vring)
            try:
                self._start(vring)
            except MessageError as error:
                failed = failed or error
        if running and not any(vring.running for vring in self.vrings):
            self._stopped()
        if failed is not None:
            raise failed

    # ------------------------------------------------------------------ rings

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise MessageError(ErrorKind.MALFORMED, f"there is no queue {index}, only 0 to {QUEUES_MAX - 1}")
        return self.vrings[index]

    def _stopped_vring(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise MessageError(ErrorKind.ORDER, f"queue {index} runs: stop it first")
        return vring

    def _set_vring_num(self, payload: VringState, _fds: list[Fd]) -> None:
        vring = self._stopped_vring(payload.queue)
        size = payload.num
        if not 1 <= size <= 1 << 15 or size & (size - 1):
            raise MessageError(ErrorKind.MALFORMED, f"{size} entries are no power of two up to 32768")
        vring.size = size

    def _set_vring_base(self, payload: VringState, _fds: list[Fd]) -> None:
        vring = self._stopped_vring(payload.queue)
        if payload.num > 0xFFFF:
            raise MessageError(ErrorKind.MALFORMED, f"{payload.num} is no index of a split ring")
        vring.base = payload.num

    def _set_vring_addr(self, payload: VringAddr, _fds: list[Fd]) -> None:
        vring = self._stopped_vring(payload.queue)
        if self.table is not None:
            for address in (payload.desc, payload.avail, payload.used):
                self.table.to_gpa(address)
        vring.addr = payload

    def _get_vring_base(self, payload: VringState, _fds: list[Fd]) -> Payload:
        vring = self._vring(payload.queue)
        self._stop(vring)
        if vring.kick is not None:
            vring.kick.close()
            vring.kick = None
        return VringState(payload.queue, vring.base)

    def _set_vring_enable(self, payload: VringState, _fds: list[Fd]) -> None:
        vring = self._vring(payload.queue)
        if payload.num > 1:
            raise MessageError(ErrorKind.MALFORMED, f"a queue is enabled by 1 or 0, not by {payload.num}")
        vring.enabled = bool(payload.num)
        if vring.enabled:
            self._start_if_due(vring)
        else:
            self._stop(vring)

    def _set_vring_kick(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self._vring_for_fd(payload, fds)
        if not fds:
            raise MessageError(ErrorKind.DESCRIPTORS, "a queue without a kick would have to be polled")
        kick = eventfd(fds[0])
        if vring.kick is not None:
            self._loop.unwatch(vring.kick.fileno())
            vring.kick.close()
        vring.kick = kick
        vring.resting = False
        if vring.running:
            self._listen(vring)
            self._serve(vring)
        else:
            self._start_if_due(vring)

    def _set_vring_call(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self._vring_for_fd(payload, fds)
        call = eventfd(fds[0]) if fds else None
        if vring.call is not None:
            vring.call.close()
        vring.call = call
        if vring.running and vring.signalled:
            # The last signal may have gone to the descriptor that nobody listens to any more.
            self._interrupt(vring)

    def _set_vring_err(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self._vring_for_fd(payload, fds)
        err = eventfd(fds[0]) if fds else None
        if vring.err is not None:
            vring.err.close()
        vring.err = err

    def _vring_for_fd(self, payload: VringFd, fds: list[Fd]) -> Vring:
        try:
            return self._vring(payload.queue)
        except MessageError:
            for fd in fds:
                fd.close()
            raise

    def _start_if_due(self, vring: Vring) -> None:
        if vring.running or vring.kick is None or not (vring.enabled or self._implicit_enable):
            return
        self._start(vring)

    def _start(self, vring: Vring) -> None:
        device = self._device
        if self.features is None:
            raise MessageError(ErrorKind.ORDER, f"queue {vring.index} cannot start before SET_FEATURES")
        layout = vring.layout(self.table)
        if not device.status() & Status.FEATURES_OK:
            self._negotiate(self.features)
        role = device.queue_role(vring.index)
        if role is None:
            raise MessageError(
                ErrorKind.RING, f"queue {vring.index} has no role with the features that were accepted"
            )
        first = not device.live
        if first:
            device.set_status(_DRIVER_OK)
        try:
            device.setup_queue(
                vring.index, layout, lambda: self._interrupt(vring), start_index=vring.base, late=True
            )
        except HostzeroError as error:
            if first:
                device.suspend()
            raise MessageError(ErrorKind.RING, str(error)) from error
        vring.running = True
        vring.broken = vring.signalled = False
        vring.idle_kicks = 0
        self.state = SessionState.RUNNING
        self._open_window()
        _log.info("queue %d (%s) runs from index %d on", vring.index, role.value, vring.base)
        self._listen(vring)
        self._serve(vring)

    def _stop(self, vring: Vring) -> None:
        if not vring.running:
            return
        self._close_window()
        self._quiet(vring)
        vring.base = self._device.stop_queue(vring.index)
        _log.info("queue %d stops at index %d", vring.index, vring.base)
        if not any(vring.running for vring in self.vrings):
            self._stopped()

    def _quiet(self, vring: Vring) -> None:
        if vring.kick is not None:
            self._loop.unwatch(vring.kick.fileno())
        vring.running = vring.scheduled = vring.resting = False

    def _stopped(self) -> None:
        self._device.suspend()
        self.state = SessionState.NEGOTIATED

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

    # Whether there was anything to do.
    def _serve(self, vring: Vring) -> bool:
        vring.scheduled = False
        if not vring.running:
            return False
        role = self._device.queue_role(vring.index)
        assert role is not None, "a ring that runs has a role"
        metrics = self._device.metrics.queues[role]
        before = metrics.requests
        more = self._device.serve(vring.index, REQUESTS_PER_TURN)
        if not vring.broken and (why := self._device.broken(vring.index)):
            vring.broken = True
            _log.warning("queue %d (%s) is broken until it is stopped: %s", vring.index, role.value, why)
            vring.report_broken()
        if more:
            vring.scheduled = True
            self._loop.soon(lambda: self._again(vring))
        return metrics.requests != before

    def _again(self, vring: Vring) -> None:
        if vring.scheduled:
            self._serve(vring)

    def _interrupt(self, vring: Vring) -> None:
        self._metrics.calls += vring.interrupt()

    # ------------------------------------------------------------------ configuration space

    def _get_config(self, payload: Config, _fds: list[Fd]) -> Payload:
        space = self._device.read_config(0, CONFIG.size)
        # A front end may be told of a larger space than the balloon has; the rest of it is zero.
        data = space[payload.offset : payload.offset + len(payload.data)]
        return Config(payload.offset, payload.flags, data.ljust(len(payload.data), b"\0"))

    def _set_config(self, payload: Config, _fds: list[Fd]) -> None:
        if payload.flags:
            raise MessageError(ErrorKind.MALFORMED, f"flags {payload.flags:#x}: migration is not offered")
        data = payload.data[: max(CONFIG.size - payload.offset, 0)]
        if data:
            self._device.write_config(payload.offset, data)

    def _announce(self) -> None:
        if self._window and self._channel is not None:
            self._channel.config_change()
        else:
            self._metrics.config_changes_dropped += 1

    def _open_window(self) -> None:
        if self._window:
            return
        self._window = True
        told, self._told = self._told, None
        if told is not None and told != self._announced():
            self._announce()

    def _close_window(self) -> None:
        if self._window:
            self._window = False
            self._told = self._announced()

    # The fields that the host changes: num_pages and the command id of hinting.
    def _announced(self) -> bytes:
        space = self._device.read_config(0, CONFIG.size)
        return space[0:4] + space[8:12]

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop everything, close every descriptor and unmap guest memory; once is enough."""
        if self.state is SessionState.CLOSED:
            return
        for vring in self.vrings:
            self._stop(vring)
            vring.close()
        self._device.on_config_change(_nobody)
        self._device.reset()
        self._device.set_memory(GuestMemory([]))
        if self.table is not None:
            self.table.close()
        if self._channel is not None:
            self._channel.close()
        self.state = SessionState.CLOSED


def _nobody() -> None:
    """Hear of a configuration change while nobody is connected."""


_NEEDS: Final[dict[Request, ProtocolFeature]] = {
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
}

_Handler = Callable[[Session, Payload, list[Fd]], Payload | None]
# `parse_request` returns the payload type of the request, which is that of its handler.
_HANDLERS: Final[dict[Request, _Handler]] = {
    Request[name.removeprefix("_").upper()]: cast("_Handler", handler)
    for name, handler in vars(Session).items()
    if name.removeprefix("_").upper() in Request.__members__
}
