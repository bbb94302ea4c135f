# SPDX-License-Identifier: GPL-2.0-only
"""A backend in a thread that answers as it is told, for tests of the front end.

It writes its messages with plain `struct` calls and shares no code with those of the product.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Self

BIT_30 = 1 << 30
PROTOCOL = 0x2229
"""MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE."""


class Heard(NamedTuple):
    """A message that the backend has received."""

    request: int
    flags: int
    payload: bytes

    @property
    def number(self) -> int:
        return int.from_bytes(self.payload[:8], "little")


Answer = Callable[[Heard], bytes | None]


class ScriptedBackend:
    """The other end of a socket pair.

    Attributes:
        sock: the front end's end.
        heard: every message, in order.
        fds: the descriptors that came, in order; closed with the backend.
        answers: the payload that answers a request, by number; others have none.
        results: what an acknowledgement says, by request; 0 for others.
        channel: the backend channel, once the front end has sent it.
    """

    def __init__(self, features: int = 0x1_200000FF | BIT_30, protocol: int = PROTOCOL) -> None:
        self.sock, self._own = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.heard: list[Heard] = []
        self.fds: list[int] = []
        self.channel: socket.socket | None = None
        self.config = bytearray(16)
        self.answers: dict[int, Answer] = {
            1: lambda _: struct.pack("=Q", features),
            15: lambda _: struct.pack("=Q", protocol),
            17: lambda _: struct.pack("=Q", 5),
            11: lambda heard: heard.payload[:4] + struct.pack("=I", 7),
            24: self._get_config,
        }
        self.results: dict[int, int] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def requests(self) -> list[int]:
        return [heard.request for heard in self.heard]

    def hang_up(self) -> None:
        """Close the connection as a backend that dies."""
        self._own.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._own.close()

    def say(self, request: int, payload: bytes = b"", flags: int = 1) -> None:
        """Send a message on the backend channel."""
        assert self.channel is not None
        self.channel.sendall(struct.pack("=III", request, flags, len(payload)) + payload)

    def reply(self, request: int, payload: bytes, flags: int = 5) -> None:
        """Send a reply that nobody has asked for."""
        self._own.sendall(struct.pack("=III", request, flags, len(payload)) + payload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()
        self._thread.join()
        self._own.close()
        if self.channel is not None:
            self.channel.close()
        for fd in self.fds:
            os.close(fd)

    def _serve(self) -> None:
        while (heard := self._receive()) is not None:
            self.heard.append(heard)
            answer = self.answers.get(heard.request)
            data = answer(heard) if answer is not None else None
            if data is None and heard.flags & 8:
                data = struct.pack("=Q", self.results.get(heard.request, 0))
            if data is not None:
                # A front end that has heard something wrong may be gone already.
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.reply(heard.request, data)

    def _receive(self) -> Heard | None:
        head = self._exactly(12)
        if head is None:
            return None
        request, flags, size = struct.unpack("=III", head)
        payload = self._exactly(size)
        if request == 21:
            self.channel = socket.socket(fileno=self.fds.pop())
        return None if payload is None else Heard(request, flags, payload)

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                part, ancillary, _, _ = self._own.recvmsg(size - len(data), 1024)
            except OSError:
                return None
            for _, _, numbers in ancillary:
                self.fds += array.array("i", numbers)
            if not part:
                return None
            data += part
        return data

    def _get_config(self, heard: Heard) -> bytes:
        offset, size, flags = struct.unpack("=III", heard.payload[:12])
        return struct.pack("=III", offset, size, flags) + bytes(self.config[offset : offset + size])
