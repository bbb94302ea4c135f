# SPDX-License-Identifier: GPL-2.0-only
"""A vhost-user socket: whole messages in and out, with the descriptors that come with them.

Either end uses it, over a blocking or a non-blocking socket. A received descriptor belongs to an
`Fd` from the moment on that it is here, and an `Fd` closes it exactly once. A message owns its
`Fd` objects until somebody takes them; closing the message closes the rest.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.messages import FDS_MAX, FLAG_REPLY, HEADER, VERSION, Header
from hostzero.vhost_user.protocol import ErrorKind, name_of

_INT: Final = array.array("i").itemsize
# Room for as many as come at once (SCM_MAX_FD): what has no room the kernel would close inside the
# call, and a close may wait (`_close`).
_ANCILLARY: Final = socket.CMSG_SPACE(253 * _INT)
_NO_LINGER: Final = struct.pack("ii", 0, 0)
_UCRED: Final = struct.Struct("iII")


class Fd:
    """A descriptor with one owner."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`."""
        self._fd = fd

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ValueError: it was closed or detached.
        """
        if self._fd < 0:
            raise ValueError("this descriptor is closed")
        return self._fd

    def detach(self) -> int:
        """Return the descriptor, which is the caller's from now on; raises as `fileno`."""
        fd, self._fd = self.fileno(), -1
        return fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Message:
    """One message as it came.

    Attributes:
        header: its checked header.
        payload: `header.size` bytes.
        fds: the descriptors that came with it, and that nobody has taken yet.
    """

    def __init__(self, header: Header, payload: bytes, fds: Sequence[Fd] = ()) -> None:
        """Take over the descriptors."""
        self.header = header
        self.payload = payload
        self.fds = list(fds)

    def take_fds(self) -> list[Fd]:
        """Return the descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody has taken."""
        for fd in self.take_fds():
            fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Peer(NamedTuple):
    """Who is at the other end of a Unix socket (SO_PEERCRED), as it was when it connected."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Ask the kernel; a pid of 0 is one that this namespace does not see."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Connection:
    """Messages over one connected stream socket, which belongs to this object.

    Attributes:
        sock: the socket; on a blocking one `receive` waits, for as long as its timeout says.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over the socket."""
        self.sock = sock
        self._header = bytearray()
        self._payload = bytearray()
        self._fds: list[Fd] = []
        self._too_many = False
        self._parsed: Header | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.sock.fileno() < 0

    def receive(self, *, reply: bool = False) -> Message | None:
        """Return the next message, or None if a non-blocking socket has no whole one yet.

        `reply` says what is due, a request or a reply. Each read stops at the end of a part, so
        that descriptors belong to the message with whose bytes they came.

        Raises:
            ConnectionLost: the peer has closed, in the middle of a message or between two, or
                the framing is broken (`Header.parse`).
            MessageError: more than `FDS_MAX` descriptors came. The message was read whole, its
                descriptors are closed, and the next one can be received.
            TimeoutError: a blocking socket's timeout has passed.
        """
        if self._parsed is None:
            if not self._fill(self._header, HEADER.size):
                return None
            self._parsed = Header.parse(bytes(self._header), reply=reply)
        header = self._parsed
        if not self._fill(self._payload, header.size):
            return None
        message = Message(header, bytes(self._payload), self._fds)
        too_many = self._too_many
        self._header.clear()
        self._payload.clear()
        self._fds = []
        self._too_many = False
        self._parsed = None
        if too_many:
            raise TooManyDescriptors(header)
        return message

    def send(self, request: int, payload: bytes = b"", *, flags: int = 0, fds: Sequence[int] = ()) -> None:
        """Send a message whole; the descriptors stay the caller's.

        Args:
            request: its number.
            payload: its payload.
            flags: `FLAG_REPLY` and `FLAG_NEED_REPLY`; the version is added here.
            fds: what is sent along, with the first byte.

        Raises:
            ConnectionLost: the peer is gone; or a non-blocking socket is full, so a peer asks
                without reading what it is answered.
        """
        data = Header(request, flags | VERSION, len(payload)).pack() + payload
        how = self._wait | socket.MSG_NOSIGNAL
        try:
            sent = 0
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                sent = self.sock.sendmsg([data], rights, how)
            while sent < len(data):
                sent += self.sock.send(data[sent:], how)
        except TimeoutError:
            raise
        except BlockingIOError as error:
            raise ConnectionLost("the peer does not read what it is sent") from error
        except OSError as error:
            raise ConnectionLost(f"cannot send {name_of(request)}: {error.strerror}") from error

    def reply(self, request: int, payload: bytes) -> None:
        """Send a reply; raises as `send`."""
        self.send(request, payload, flags=FLAG_REPLY)

    def close(self) -> None:
        """Close the socket and the descriptors of a message that is not whole yet."""
        for fd in self._fds:
            fd.close()
        self._fds = []
        if self.sock.fileno() >= 0:
            _close(self.sock.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # O_NONBLOCK belongs to the open file, and whoever gave it to us may make it blocking again: each
    # call says by itself that it must not wait in the kernel. Python's own timeouts are not affected.
    @property
    def _wait(self) -> int:
        return 0 if self.sock.gettimeout() is None else socket.MSG_DONTWAIT

    # Whether `buffer` has `size` bytes now.
    def _fill(self, buffer: bytearray, size: int) -> bool:
        while len(buffer) < size:
            try:
                data, ancillary, _flags, _address = self.sock.recvmsg(
                    size - len(buffer), _ANCILLARY, socket.MSG_CMSG_CLOEXEC | self._wait
                )
            except TimeoutError:
                raise
            except BlockingIOError:
                return False
            except OSError as error:
                raise ConnectionLost(f"cannot receive: {error.strerror}") from error
            if ancillary:
                self._keep(_received(ancillary))
            if not data:
                within = bool(self._header)
                raise ConnectionLost("the peer closed in the middle of a message" if within else CLOSED)
            buffer += data
        return True

    # Descriptors may come with each byte, so that those of one message would be all that a process
    # can have: too many are closed as they come, not once the message is whole.
    def _keep(self, fds: list[Fd]) -> None:
        self._fds += fds
        if self._too_many or len(self._fds) > FDS_MAX:
            self._too_many = True
            for fd in self._fds:
                fd.close()
            self._fds = []


CLOSED: Final = "the peer closed"
"""The text of a `ConnectionLost` that is no mistake of anybody."""


class TooManyDescriptors(MessageError):
    """More descriptors came with a message than any message may have; all were closed.

    Attributes:
        header: that message's header, so that it can be answered.
    """

    def __init__(self, header: Header) -> None:
        """Name the message."""
        super().__init__(ErrorKind.DESCRIPTORS, f"more than {FDS_MAX} descriptors")
        self.header = header


# The last close of a TCP socket with SO_LINGER waits until everything is read that was sent over it, or
# for as long as whoever passed the socket on has said: it could be hours.
def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # it is no socket, as most are
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        finally:
            sock.detach()
    os.close(fd)


# What the kernel cut off (MSG_CTRUNC) for want of free descriptors it has closed itself.
def _received(ancillary: Sequence[tuple[int, int, bytes]]) -> list[Fd]:
    fds = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % _INT])
            fds += [Fd(number) for number in numbers]
    return fds
