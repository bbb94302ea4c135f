# SPDX-License-Identifier: GPL-2.0-only
"""The control socket: a local stream socket on which an operator steers and watches a device.

It is served in the backend's own loop, so what it says is one moment's truth, and it costs the
guest little: each event leads to at most one answer, a client that does not read its answers is
not read either, and there are at most `CLIENTS_MAX` clients. The socket's mode is 0600; whoever
may connect may do what the backend may do.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hostzero.errors import UsageError
from hostzero.vhost_user.control_commands import Commands, Service
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX, Refusal

CLIENTS_MAX: Final = 16
"""Clients at a time; a `hostzero top` is one."""

_BACKLOG: Final = 16

Callback = Callable[[int], None]


class ControlServer:
    """The listening socket and its clients, in somebody else's loop.

    Every file object is registered in the selector with a callback as its data, which takes the
    mask of events. ::

        for key, mask in selector.select():
            key.data(mask)

    Attributes:
        commands: what answers.
    """

    def __init__(self, service: Service, selector: selectors.BaseSelector) -> None:
        """Answer for `service`, in the loop that runs `selector`; nobody can connect yet."""
        self.commands = Commands(service)
        self._selector = selector
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._inode = (0, 0)
        self._clients: set[_Client] = set()

    def listen(self, path: Path) -> None:
        """Make the socket at `path`, in place of one that nobody listens on any more.

        Raises:
            UsageError: something else is there, or a socket that somebody listens on, or it
                cannot be made.
        """
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(path))
            # Before listen(): until then nobody can connect, whatever the mode.
            path.chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise UsageError(f"cannot make the control socket {path}: {error.strerror or error}") from error
        self._listener, self._path, self._inode = listener, path, _inode(path)
        self._selector.register(listener, selectors.EVENT_READ, self._on_connection)

    def connect(self) -> socket.socket:
        """Return the other end of a client in this process, for another thread to use."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._add(ours)
        return theirs

    def close(self) -> None:
        """Remove the socket and send every client away; a second call does nothing."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._selector.unregister(listener)
            listener.close()
        path, self._path = self._path, None
        if path is not None and _inode(path) == self._inode:
            path.unlink(missing_ok=True)
        for client in list(self._clients):
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _on_connection(self, _mask: int) -> None:
        assert self._listener is not None, "unregistered with the listener"
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # It went away again, or there is no descriptor left: then the next event tries again.
            return
        if len(self._clients) < CLIENTS_MAX:
            self._add(connection)
            return
        self.commands.metrics.refused_clients += 1
        with connection, contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(self.commands.error(Refusal.BUSY, f"{CLIENTS_MAX} clients are connected already"))

    def _add(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.commands.metrics.clients += 1
        self._clients.add(_Client(connection, self.commands, self._selector, self._clients.discard))


class _Client:
    """One connection: a buffer with what was sent but not answered, one with an answer on its way."""

    def __init__(
        self,
        connection: socket.socket,
        commands: Commands,
        selector: selectors.BaseSelector,
        on_close: Callable[[_Client], None],
    ) -> None:
        self._socket = connection
        self._commands = commands
        self._selector = selector
        self._on_close = on_close
        self._received = bytearray()
        self._unsent = b""
        self._last = False
        selector.register(connection, selectors.EVENT_READ, self._on_event)

    def close(self) -> None:
        self._selector.unregister(self._socket)
        self._socket.close()
        self._on_close(self)

    # One answer an event. A whole line that is still waiting makes the client wait for being
    # writable, which brings the next event at once but lets everybody else have theirs first.
    def _on_event(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ and not self._receive():
                self.close()
                return
            if not self._unsent:
                self._answer()
            self._send()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._last and not self._unsent:
            self.close()
            return
        waits = self._unsent or b"\n" in self._received
        self._selector.modify(
            self._socket, selectors.EVENT_WRITE if waits else selectors.EVENT_READ, self._on_event
        )

    def _receive(self) -> bool:
        data = self._socket.recv(LINE_BYTES_MAX - len(self._received))
        self._received += data
        return bool(data)

    def _answer(self) -> None:
        end = self._received.find(b"\n") + 1
        if end:
            line = bytes(self._received[:end])
            del self._received[:end]
            self._unsent = self._commands.answer(line)
        elif len(self._received) >= LINE_BYTES_MAX:
            # Where the next request would begin is not known.
            self._last = True
            self._unsent = self._commands.error(
                Refusal.MALFORMED, f"a request has at most {LINE_BYTES_MAX} bytes"
            )

    def _send(self) -> None:
        if self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = path.lstat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


# A backend that was killed leaves its socket behind. One that lives is left alone.
def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot make the control socket {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} is there already and is no socket: name another control socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except OSError as error:
            raise UsageError(f"cannot use the control socket {path}: {error.strerror or error}") from error
    raise UsageError(f"{path} is in use by another program: name another control socket")
