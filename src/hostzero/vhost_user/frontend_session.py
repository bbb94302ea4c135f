# SPDX-License-Identifier: GPL-2.0-only
"""The front end's side of a vhost-user session: requests, their replies, and the backend channel.

::

    CONNECTED --greet--> READY --close, or the backend went--> CLOSED

While a reply is waited for, the backend channel is served: a backend may want an answer there
before it goes on (QEMU and a backend have stalled each other that way). Neither that nor a reply that
comes in pieces gives the backend more time: a reply has one deadline.
"""

from __future__ import annotations

import enum
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Final

from hostzero.errors import ConnectionLost, DeviceError, VhostUserError
from hostzero.vhost_user.connection import Connection, Message
from hostzero.vhost_user.messages import FLAG_NEED_REPLY, REPLY_PAYLOADS
from hostzero.vhost_user.payloads import U64, Empty, Payload
from hostzero.vhost_user.protocol import (
    F_PROTOCOL_FEATURES,
    BackendRequest,
    ProtocolFeature,
    Request,
    name_of,
)

WANTED: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
)
"""The protocol features that a front end of a balloon has a use for."""

EMPTY: Final = Empty()


class FrontEndState(enum.Enum):
    """Where a session stands."""

    CONNECTED = "connected"
    READY = "ready"
    CLOSED = "closed"


class FrontEndSession:
    """Requests to a backend, one at a time.

    Attributes:
        state: where the session stands.
        features: the virtio features of the backend, bit 30 included; from `greet` on.
        protocol: the protocol features that both ends have.
        queues: how many queues the backend has; 2 if it cannot say.
        config_changes: called for each CONFIG_CHANGE_MSG.
    """

    def __init__(self, sock: socket.socket, timeout: float, clock: Callable[[], float]) -> None:
        """Take over a connected socket; each reply may take `timeout` seconds of `clock`."""
        sock.settimeout(timeout)
        self.state = FrontEndState.CONNECTED
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.queues = 2
        self.config_changes: Callable[[], None] = lambda: None
        self._timeout = timeout
        self._clock = clock
        self._exit = ExitStack()
        self._main = self._exit.enter_context(Connection(sock))
        self._channel: Connection | None = None

    def greet(self) -> None:
        """Find out what the backend can do, up to SET_OWNER.

        Raises:
            VhostUserError: it has no protocol features or no configuration space, which a
                balloon needs.
            ConnectionLost, TimeoutError: it went away or does not answer.
        """
        self._need(FrontEndState.CONNECTED)
        self.features = self.number(Request.GET_FEATURES)
        if not self.features & F_PROTOCOL_FEATURES:
            raise VhostUserError("the backend has no protocol features (bit 30), so no configuration space")
        self.protocol = WANTED & ProtocolFeature(self.number(Request.GET_PROTOCOL_FEATURES))
        if ProtocolFeature.CONFIG not in self.protocol:
            raise VhostUserError("the backend has no CONFIG protocol feature, and a balloon is steered by it")
        self.tell(Request.SET_PROTOCOL_FEATURES, U64(int(self.protocol)))
        self.state = FrontEndState.READY
        if ProtocolFeature.MQ in self.protocol:
            self.queues = self.number(Request.GET_QUEUE_NUM)
        if ProtocolFeature.BACKEND_REQ in self.protocol:
            self._open_channel()
        self.tell(Request.SET_OWNER)

    def ask(self, request: Request, payload: Payload = EMPTY) -> Payload:
        """Send a request and return its reply.

        Raises:
            MessageError: the reply is malformed.
            ConnectionLost, TimeoutError: as `greet`.
        """
        self._main.send(request, payload.pack())
        return self._reply_to(request, REPLY_PAYLOADS[request])

    def number(self, request: Request) -> int:
        """Send a request whose reply is a number, and return that; raises as `ask`."""
        reply = self.ask(request)
        assert isinstance(reply, U64)
        return reply.value

    def tell(self, request: Request, payload: Payload = EMPTY, fds: Sequence[int] = ()) -> None:
        """Send a request that has no reply, and have it acknowledged if the backend can do that.

        Raises:
            DeviceError: the backend refuses it.
            ConnectionLost, TimeoutError: as `greet`.
        """
        # Before the protocol features are set there are no acknowledgements.
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol and self.state is FrontEndState.READY
        self._main.send(request, payload.pack(), flags=FLAG_NEED_REPLY if acknowledged else 0, fds=fds)
        if acknowledged:
            result = self._reply_to(request, U64)
            assert isinstance(result, U64)
            if result.value:
                raise DeviceError(f"the backend refuses {name_of(request)}: result {result.value}")

    def filenos(self) -> list[int]:
        """Return the descriptors that become readable when the backend says something by itself."""
        return [self._main.sock.fileno(), *([self._channel.sock.fileno()] if self._channel else [])]

    def serve(self, readable: Iterable[int]) -> None:
        """Take what has come on descriptors of `filenos`.

        Raises:
            ConnectionLost: the backend went away, or has sent a reply that nobody waits for.
        """
        ready = set(readable)
        if self._channel is not None and self._channel.sock.fileno() in ready:
            self._serve_channel(self._channel)
        # Only an end can come here: replies are read by whoever asked.
        if self._main.sock.fileno() in ready and (message := self._arrived()) is not None:
            message.close()
            raise ConnectionLost("the backend sent a reply to no request")

    def close(self) -> None:
        """Close every socket; a second call does nothing."""
        self.state = FrontEndState.CLOSED
        self._exit.close()

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # Nobody waits here: not for the rest of a message, nor for a backend that reads no answers.
        ours.setblocking(False)
        self._channel = self._exit.enter_context(Connection(ours))
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def _reply_to(self, request: Request, kind: type[Payload]) -> Payload:
        with self._reply(request) as message:
            if message.header.request != request:
                raise ConnectionLost(
                    f"the reply to {name_of(request)} is one to {name_of(message.header.request)}"
                )
            return kind.parse(message.payload)

    def _reply(self, request: Request) -> Message:
        deadline = self._clock() + self._timeout
        while True:
            left = deadline - self._clock()
            readable, _, _ = select.select(self.filenos(), [], [], max(left, 0.0))
            if self._main.sock.fileno() in readable:
                if (message := self._arrived(reply=True)) is not None:
                    return message
            elif left > 0:
                self.serve(readable)
            if left <= 0:
                raise TimeoutError(f"the backend does not answer {name_of(request)}")

    def _serve_channel(self, channel: Connection) -> None:
        message = channel.receive()
        if message is None:
            return
        with message:
            known = message.header.request == BackendRequest.CONFIG_CHANGE_MSG
            if message.header.need_reply:
                channel.reply(message.header.request, U64(0 if known else 1).pack())
        if known:
            self.config_changes()

    # What has come on the main socket, or None if it is no whole message. Only what is sent may wait.
    def _arrived(self, *, reply: bool = False) -> Message | None:
        sock = self._main.sock
        sock.setblocking(False)
        try:
            return self._main.receive(reply=reply)
        finally:
            sock.settimeout(self._timeout)

    def _need(self, state: FrontEndState) -> None:
        if self.state is not state:
            raise VhostUserError(f"the session is {self.state.value} and has to be {state.value}")
