# SPDX-License-Identifier: GPL-2.0-only
"""The other end of the control socket: one request, one answer, or an error that says why."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from hostzero.errors import ControlError, UsageError
from hostzero.vhost_user.control_protocol import PROTOCOL_VERSION, Refusal

ANSWER_BYTES_MAX: Final = 1 << 20
"""The longest answer that is read; a status has about 6 KB."""

TIMEOUT: Final = 10.0
"""Seconds that a device has for an answer. It answers between two batches of guest requests; one
that takes this long is stopped or stuck in a discard."""


class ControlClient:
    """One connection to a device's control socket; blocking."""

    def __init__(self, connected: socket.socket, timeout: float = TIMEOUT) -> None:
        """Take over a connected socket; each answer may take `timeout` seconds."""
        connected.settimeout(timeout)
        self._socket = connected
        self._timeout = timeout
        self._received = b""
        self._owed = 0

    @classmethod
    def open(cls, path: Path, timeout: float = TIMEOUT) -> Self:
        """Connect to the control socket at `path`.

        Raises:
            UsageError: nobody listens there, or this user may not connect.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise UsageError(f"{path}: {_why(error)}") from error
        return cls(sock, timeout)

    def request(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send one request and return its result.

        Raises:
            UsageError: the device does not take these arguments.
            ControlError: the device refuses, does not answer in time, is gone, or speaks another
                version of the protocol. An answer that comes too late is skipped by the next
                request.
        """
        request: dict[str, object] = {"version": PROTOCOL_VERSION, "command": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError as error:
            raise ControlError(self._no_answer()) from error
        except OSError:
            # It may have said why before it closed: too many clients.
            pass
        self._owed += 1
        while True:
            line = self._read_line()
            self._owed -= 1
            if not self._owed:
                return _result(line)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_line(self) -> bytes:
        while b"\n" not in self._received:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise ControlError(self._no_answer()) from error
            except OSError:
                data = b""
            if not data:
                raise ControlError(
                    "the device closed the connection: it has ended, or it is no hostzero device"
                )
            self._received += data
            if len(self._received) > ANSWER_BYTES_MAX:
                raise ControlError(f"an answer is longer than {ANSWER_BYTES_MAX} bytes")
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _no_answer(self) -> str:
        return f"no answer in {self._timeout:g} s: the device is stopped or busy"


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such socket; a device makes one with hostzero device --control PATH"
    if isinstance(error, ConnectionRefusedError):
        return "no device listens there any more"
    if isinstance(error, PermissionError):
        return "only the user who runs the device may connect"
    return f"cannot connect: {error.strerror or error}"


def _result(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if answer["version"] != PROTOCOL_VERSION:
            raise ControlError(f"the device speaks version {answer['version']!r}, this is {PROTOCOL_VERSION}")
        if answer["ok"] is True:
            result = answer["result"]
            if not isinstance(result, dict):
                raise TypeError("no object")
            return result
        kind, message = answer["error"]["kind"], answer["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ControlError("the answer is none of a hostzero device: is this its control socket?") from error
    if kind == Refusal.INVALID_ARGUMENT:
        raise UsageError(str(message))
    raise ControlError(str(message))
