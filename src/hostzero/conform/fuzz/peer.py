# SPDX-License-Identifier: GPL-2.0-only
"""A front end that sends what it likes and still knows when it was answered.

Nothing is packed by rules here: a message is a header of three numbers, bytes and descriptors.
GET_FEATURES, which is always sent well-formed, marks how far the backend has come: its replies are
counted, and all others on the way are only sorted into kinds.
"""

from __future__ import annotations

import array
import contextlib
import errno
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hostzero.conform.fuzz.finding import Ended, Found, Kind
from hostzero.conform.fuzz.watch import PATIENCE
from hostzero.vhost_user.messages import FLAG_NEED_REPLY, HEADER, VERSION
from hostzero.vhost_user.protocol import Request, name_of

LAST_MAX: Final = 32
"""How much of what was done last is told with a finding."""

_LOOK_EVERY: Final = 0.002


class Log:
    """What was done, counted by kind, and the last of it in words."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=LAST_MAX)
        self.steps = 0

    def note(self, kind: str, text: str) -> None:
        """Count a step, and say it."""
        self.steps += 1
        self.done[kind] += 1
        self.last.append(f"{kind}: {text}")


def connect(path: Path) -> socket.socket:
    """Return a socket that is connected to `path`; each call on it may take `PATIENCE`.

    Raises:
        OSError: nobody listens; a TimeoutError if nobody accepts.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                sock.connect(str(path))
            except BlockingIOError as error:
                # Too many wait to be accepted. A socket with a time limit is not made to wait for that.
                if time.monotonic() > deadline:
                    raise TimeoutError("no connection is accepted") from error
                time.sleep(_LOOK_EVERY)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


class Peer:
    """One connection.

    Attributes:
        sock: its socket.
        log: what was done.
        acknowledges: whether the backend can say yes and no (REPLY_ACK was accepted).
    """

    def __init__(self, path: Path, log: Log) -> None:
        """Connect; the backend may end it at once, if it serves somebody else.

        Raises:
            Found: nobody listens any more, or accepts.
        """
        self.log = log
        self.acknowledges = False
        try:
            self.sock = connect(path)
        except TimeoutError as error:
            raise Found(Kind.SILENT, f"{error} in {PATIENCE:g} s") from error
        except OSError as error:
            raise Found(Kind.DIED, f"cannot connect any more: {error.strerror or error}") from error

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send one message, whose header may say another size than it has.

        Raises:
            Ended: the backend has closed.
        """
        self.send_raw(
            HEADER.pack(request & 0xFFFF_FFFF, flags, len(payload) if size is None else size) + payload, fds
        )

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes; raises as `send`."""
        try:
            sent = self._send_first(data, fds)
            while sent < len(data):
                sent += self.sock.send(data[sent:], socket.MSG_NOSIGNAL)
        except TimeoutError as error:
            raise Found(Kind.SILENT, "the backend reads nothing from its socket any more") from error
        except OSError as error:
            raise Ended from error

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a well-formed request that has to succeed, and wait until it has.

        Raises:
            Ended: as `send`.
            Found: it was refused or not answered.
        """
        if not self.acknowledges:
            self.send(request, payload, fds)
            self.sync()
            return
        self.send(request, payload, fds, VERSION | FLAG_NEED_REPLY)
        got, data = self._reply()
        if got != request:
            raise Found(Kind.SILENT, f"the answer to {name_of(request)} is one to {name_of(got)}")
        if data != bytes(8):
            raise Found(Kind.REFUSED, f"{name_of(request)}, which is well-formed, is refused: {data.hex()}")

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """Send a well-formed request that has a reply, and return that; raises as `tell`."""
        self.send(request, payload)
        got, data = self._reply()
        if got != request:
            raise Found(Kind.SILENT, f"the answer to {name_of(request)} is one to {name_of(got)}")
        return data

    def number(self, request: Request) -> int:
        """Send a well-formed request whose reply is a number, and return that; raises as `tell`."""
        data = self.ask(request)
        if len(data) != 8:
            raise Found(Kind.REFUSED, f"{name_of(request)} is answered by {len(data)} bytes, not a number")
        return int(struct.unpack("=Q", data)[0])

    def sync(self) -> None:
        """Wait until everything that was sent has been read, and take all replies.

        Raises:
            Ended: the backend has closed.
            Found: it does not answer.
        """
        self.send(Request.GET_FEATURES)
        while True:
            request, data = self._reply()
            if request == Request.GET_FEATURES:
                return
            self.log.answers["nothing" if not data else "success" if data == bytes(8) else "other"] += 1

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.sock.close()

    # The kernel bounds what descriptors one user has under way, over all sockets, and refuses more
    # until the other ends have read some; it does not make us wait as it does for bytes.
    def _send_first(self, data: bytes, fds: Sequence[int]) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError from error
            time.sleep(_LOOK_EVERY)

    def _reply(self) -> tuple[int, bytes]:
        request, _flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return request, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.sock.recv(size - len(data))
            except TimeoutError as error:
                raise Found(Kind.SILENT, f"no answer on the vhost-user socket in {PATIENCE:g} s") from error
            except OSError as error:
                raise Ended from error
            if not part:
                raise Ended
            data += part
        return data
