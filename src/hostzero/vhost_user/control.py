# SPDX-License-Identifier: GPL-2.0-only
"""The control socket: a local stream socket on which an operator steers and watches a device.

It is served in the backend's own asyncio loop, so what it says is one moment's truth, and it
costs the guest little: after each answer everybody else has a turn, a client that does not read
its answers is not read either, and there are at most `CLIENTS_MAX` clients.
"""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Final, Self

from hostzero.vhost_user.control_commands import Commands, Service
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX, Refusal

CLIENTS_MAX: Final = 16
"""Clients at a time; a `hostzero top` is one."""

BACKLOG: Final = 16
"""Clients that wait to be accepted."""
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
        self._clients: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket) -> None:
        """Accept clients on a listening socket, which is taken over."""
        self._server = await asyncio.start_unix_server(
            self._on_connection, sock=listener, limit=_STREAM_LIMIT, backlog=BACKLOG
        )

    async def connect(self) -> socket.socket:
        """Return the other end of a client in this process, for another thread to use."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_STREAM_LIMIT)
        self._begin(reader, writer)
        return theirs

    async def close(self) -> None:
        """Stop listening and send every client away; a second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
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
