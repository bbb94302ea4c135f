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
from typing import TYPE_CHECKING, Final, cast

from hostzero.device import BalloonDevice
from hostzero.errors import HostzeroError, MessageError
from hostzero.ram import GuestMemory
from hostzero.vhost_user.announcer import Announcer
from hostzero.vhost_user.backend_channel import BackendChannel
from hostzero.vhost_user.connection import Fd, Message
from hostzero.vhost_user.memory_table import MappedTable
from hostzero.vhost_user.messages import REPLY_PAYLOADS, Header, parse_request
from hostzero.vhost_user.payloads import U64, Config, MemTable, Payload, VringAddr, VringFd, VringState
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, ErrorKind, ProtocolFeature, Request, name_of
from hostzero.vhost_user.rings import QUEUES_MAX, Loop, Rings
from hostzero.vhost_user.vring import eventfd
from hostzero.virtio.balloon import CONFIG
from hostzero.virtio.ring_layout import QUEUE_SIZE_MAX

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics

_log = logging.getLogger(__name__)

OFFERED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
)
"""The protocol features that are implemented, and so offered."""

LOG_LINES_MAX: Final = 16
"""Log lines about refused messages in one session; the counters count all of them."""


class SessionState(enum.Enum):
    """Where a session stands; the module's docstring draws it."""

    CONNECTED = "connected"
    OWNED = "owned"
    NEGOTIATED = "negotiated"
    RUNNING = "running"
    CLOSED = "closed"


_ANY: Final = frozenset(SessionState) - {SessionState.CLOSED}
_OWNED: Final = _ANY - {SessionState.CONNECTED}
_DUE: Final[dict[int, frozenset[SessionState]]] = {
    Request.GET_FEATURES: _ANY,
    Request.GET_PROTOCOL_FEATURES: _ANY,
    Request.SET_PROTOCOL_FEATURES: _ANY - {SessionState.RUNNING},
    Request.GET_QUEUE_NUM: _ANY,
    Request.SET_BACKEND_REQ_FD: _ANY,
    Request.GET_CONFIG: _ANY,
    Request.SET_OWNER: frozenset({SessionState.CONNECTED}),
}
# Every other request is due from SET_OWNER on.


class Session:
    """A connection's state, between its first message and its end.

    Attributes:
        state: where it stands.
        rings: its rings, its virtio features and its memory.
    """

    def __init__(self, device: BalloonDevice, loop: Loop, metrics: ServiceMetrics) -> None:
        """Serve `device`, which no other session serves."""
        self.state = SessionState.CONNECTED
        self._protocol = 0  # a plain number: two messages come for every buffer, and a flag is slow to ask
        self._device = device
        self._metrics = metrics
        self._announcer = Announcer(device, metrics)
        self.rings = Rings(device, loop, metrics, self._announcer)
        self._logged = 0

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
                self._check_due(header.request)
                # A handler takes what it keeps out of the list; the rest is closed with the message.
                answer = _HANDLERS[header.request](self, payload, message.fds)
            except (HostzeroError, OSError) as error:
                return self.refuse(header, error)
            except Exception as error:  # noqa: BLE001 - a defect here is not worth a guest's balloon
                _log.exception("%s failed", name_of(header.request))
                return self.refuse(header, MessageError(ErrorKind.INTERNAL, str(error)))
            finally:
                if header.request not in _STILL:
                    self._settle()
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
        if self._logged == LOG_LINES_MAX:
            _log.warning("further refusals of this session are only counted")
        if header.request in REPLY_PAYLOADS:
            return b""
        return U64(1).pack() if self._wants_ack(header) else None

    def _wants_ack(self, header: Header) -> bool:
        return header.need_reply and bool(self._protocol & _REPLY_ACK)

    # From SET_OWNER on the state follows from what there is, also after half a failure.
    def _settle(self) -> None:
        if self.state is SessionState.CONNECTED:
            return
        if self.rings.running:
            self.state = SessionState.RUNNING
        elif self.rings.features is not None:
            self.state = SessionState.NEGOTIATED
        else:
            self.state = SessionState.OWNED

    def _check_due(self, request: int) -> None:
        if self.state not in _DUE.get(request, _OWNED):
            raise MessageError(ErrorKind.ORDER, f"it is not due in the state {self.state.value!r}")
        needed = _NEEDS.get(request)
        if needed is not None and not self._protocol & needed:
            raise MessageError(
                ErrorKind.ORDER, f"the protocol feature {ProtocolFeature(needed).name} was not accepted"
            )

    @property
    def acked_protocol(self) -> ProtocolFeature:
        """The protocol features that the front end has accepted."""
        return ProtocolFeature(self._protocol)

    # ------------------------------------------------------------------ features and ownership

    def _get_features(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(self._device.device_features() | F_PROTOCOL_FEATURES)

    def _set_features(self, payload: U64, _fds: list[Fd]) -> None:
        features = payload.value & ~F_PROTOCOL_FEATURES
        if self.state is SessionState.RUNNING:
            if features != self.rings.features:
                raise MessageError(ErrorKind.ORDER, "features cannot change while rings run")
            return
        self.rings.implicit_enable = not payload.value & F_PROTOCOL_FEATURES
        self.rings.negotiate(features)

    def _get_protocol_features(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(int(OFFERED))

    def _set_protocol_features(self, payload: U64, _fds: list[Fd]) -> None:
        unknown = payload.value & ~int(OFFERED)
        if unknown:
            raise MessageError(ErrorKind.FEATURES, f"protocol features {unknown:#x} were not offered")
        self._protocol = payload.value

    def _get_queue_num(self, _payload: Payload, _fds: list[Fd]) -> Payload:
        return U64(QUEUES_MAX)

    def _set_owner(self, _payload: Payload, _fds: list[Fd]) -> None:
        self.state = SessionState.OWNED

    # Deprecated: "use it to disable all rings" is what the specification recommends.
    def _reset_owner(self, _payload: Payload, _fds: list[Fd]) -> None:
        self.rings.stop_all()

    def _reset_device(self, _payload: Payload, _fds: list[Fd]) -> None:
        self.rings.stop_all()
        self.rings.features = None
        for vring in self.rings.vrings:
            vring.base = 0
        self._device.reset()

    def _set_backend_req_fd(self, _payload: Payload, fds: list[Fd]) -> None:
        self._announcer.use(BackendChannel(fds.pop(), self._metrics))

    # ------------------------------------------------------------------ memory

    def _set_mem_table(self, payload: MemTable, fds: list[Fd]) -> None:
        self.rings.remap(MappedTable(payload, [fd.fileno() for fd in fds]))

    # ------------------------------------------------------------------ rings

    def _set_vring_num(self, payload: VringState, _fds: list[Fd]) -> None:
        vring = self.rings.stopped(payload.queue)
        size = payload.num
        if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise MessageError(
                ErrorKind.MALFORMED, f"{size} entries are no power of two up to {QUEUE_SIZE_MAX}"
            )
        vring.size = size

    def _set_vring_base(self, payload: VringState, _fds: list[Fd]) -> None:
        vring = self.rings.stopped(payload.queue)
        if payload.num > 0xFFFF:
            raise MessageError(ErrorKind.MALFORMED, f"{payload.num} is no index of a split ring")
        vring.base = payload.num

    def _set_vring_addr(self, payload: VringAddr, _fds: list[Fd]) -> None:
        vring = self.rings.stopped(payload.queue)
        if self.rings.table is not None:
            for address in (payload.desc, payload.avail, payload.used):
                self.rings.table.to_gpa(address)
        vring.addr = payload

    def _get_vring_base(self, payload: VringState, _fds: list[Fd]) -> Payload:
        vring = self.rings.vring(payload.queue)
        self.rings.stop(vring)
        vring.drop_kick()
        return VringState(payload.queue, vring.base)

    def _set_vring_enable(self, payload: VringState, _fds: list[Fd]) -> None:
        if payload.num > 1:
            raise MessageError(ErrorKind.MALFORMED, f"a queue is enabled by 1 or 0, not by {payload.num}")
        self.rings.enable(payload.queue, bool(payload.num))

    def _set_vring_kick(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self.rings.vring(payload.queue)
        if not fds:
            raise MessageError(ErrorKind.DESCRIPTORS, "a queue without a kick would have to be polled")
        self.rings.use_kick(vring, eventfd(fds))

    def _set_vring_call(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self.rings.vring(payload.queue)
        self.rings.use_call(vring, eventfd(fds) if fds else None)

    def _set_vring_err(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self.rings.vring(payload.queue)
        err = eventfd(fds) if fds else None
        if vring.err is not None:
            vring.err.close()
        vring.err = err

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

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop everything, close every descriptor and unmap guest memory; once is enough.

        The device is as new then, but for the target and the counters.
        """
        if self.state is SessionState.CLOSED:
            return
        self.rings.close()
        self._announcer.close()
        self._device.reset()
        self._device.set_memory(GuestMemory([]))
        if self.rings.table is not None:
            self.rings.table.close()
        self.state = SessionState.CLOSED


_NEEDS: Final[dict[int, int]] = {
    int(Request.SET_BACKEND_REQ_FD): int(ProtocolFeature.BACKEND_REQ),
    int(Request.GET_CONFIG): int(ProtocolFeature.CONFIG),
    int(Request.SET_CONFIG): int(ProtocolFeature.CONFIG),
    int(Request.RESET_DEVICE): int(ProtocolFeature.RESET_DEVICE),
}
_REPLY_ACK: Final = int(ProtocolFeature.REPLY_ACK)
_STILL: Final = frozenset({int(Request.GET_CONFIG), int(Request.SET_CONFIG)})
"""Requests after which a session stands where it stood."""

_Handler = Callable[[Session, Payload, list[Fd]], Payload | None]
# `parse_request` returns the payload type of the request, which is that of its handler.
_HANDLERS: Final[dict[int, _Handler]] = {
    int(Request[name.removeprefix("_").upper()]): cast("_Handler", handler)
    for name, handler in vars(Session).items()
    if name.removeprefix("_").upper() in Request.__members__
}
