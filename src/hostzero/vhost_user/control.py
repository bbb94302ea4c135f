# SPDX-License-Identifier: GPL-2.0-only
"""The control socket: a local stream socket on which an operator steers and watches a device.

It is served in the backend's own asyncio loop, so what it says is one moment's truth, and it
costs the guest little: after each answer everybody else has a turn, a client that does not read
its answers is not read either, and there are at most `CLIENTS_MAX` clients. The socket's mode is
0600; whoever may connect may do what the backend may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hostzero.errors import UsageError
from hostzero.vhost_user.control_commands import Commands, Service
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX, Refusal

CLIENTS_MAX: Final = 16
"""Clients at a time; a `hostzero top` is one."""

_BACKLOG: Final = 16
# The limit of a stream is that of a line without its newline.
_STREAM_LIMIT: Final = LINE_BYTES_MAX - 1


class ControlServer:
    """The listening socket and its clients, in the running asyncio loop.

    Attributes:
        commands: what answers.
    """

    def __init__(self, service: Service) -> None:
        """Answer for `service`; nobody can connect yet."""
        self.commands = Commands(service)
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._inode = (0, 0)
        self._clients: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        """Make the socket at `path`, in place of one that nobody listens on any more.

        Raises:
            UsageError: something else is there, or a socket that somebody listens on, or it
                cannot be made.
        """
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(path))
            # Before anybody listens: until then nobody can connect, whatever the mode.
            path.chmod(0o600)
        except OSError as error:
            listener.close()
            raise UsageError(f"cannot make the control socket {path}: {error.strerror or error}") from error
        self._path, self._inode = path, _inode(path)
        self._server = await asyncio.start_unix_server(
            self._on_connection, sock=listener, limit=_STREAM_LIMIT, backlog=_BACKLOG
        )

    async def connect(self) -> socket.socket:
        """Return the other end of a client in this process, for another thread to use."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_STREAM_LIMIT)
        self._begin(reader, writer)
        return theirs

    async def close(self) -> None:
        """Remove the socket and send every client away; a second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        path, self._path = self._path, None
        if path is not None and _inode(path) == self._inode:
            path.unlink(missing_ok=True)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) < CLIENTS_MAX and self._server is not None:
            self._begin(reader, writer)
            return
        self.commands.metrics.refused_clients += 1
        writer.write(self.commands.error(Refusal.BUSY, f"{CLIENTS_MAX} clients are connected already"))
        writer.close()

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.commands.metrics.clients += 1
        client = asyncio.ensure_future(self._serve(reader, writer))
        self._clients.add(client)

        # Not at the end of the task: one that is cancelled before its first step has no end.
        def end(client: asyncio.Task[None]) -> None:
            self._clients.discard(client)
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # what a client does not take by now is not kept for it
            writer.close()

        client.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # With no buffer between, drain() waits until the client has room for what it asked for.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            while line := await self._read_line(reader, writer):
                writer.write(self.commands.answer(line))
                await writer.drain()
                # Neither the read nor the drain waits if there is no need to.
                await asyncio.sleep(0)
        except OSError:
            pass  # it went away without its answer

    # An empty line is the end.
    async def _read_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            return await reader.readuntil()
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError:
            # Where the next request would begin is not known.
            writer.write(
                self.commands.error(Refusal.MALFORMED, f"a request has at most {LINE_BYTES_MAX} bytes")
            )
            await writer.drain()
            return b""


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
