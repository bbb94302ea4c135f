# SPDX-License-Identifier: GPL-2.0-only
"""Commands for the shell in the guest, over its second serial port.

A command is one line, ``NUMBER COMMAND``. Its answer is a line ``@NUMBER STATUS LENGTH`` and
then LENGTH bytes, what the command wrote to both of its outputs. Once, when the guest is up,
it says ``@ready 0 0``.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from typing import Final

from hostzero.errors import VmError

LINE_MAX: Final = 4000
"""The longest command: a terminal line holds 4095 bytes."""
OUTPUT_MAX: Final = 16 << 20

_HEADER: Final = re.compile(rb"@(?P<number>ready|\d+) (?P<status>\d+) +(?P<length>\d+)")


class Unanswered(VmError):
    """The guest did not answer in time, or its serial port was closed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command in the guest came to."""

    status: int
    output: str


def parse_header(line: bytes) -> tuple[str, int, int] | None:
    """Return number, status and length of an answer's first line, or None if it is none."""
    match = _HEADER.fullmatch(line.strip())
    if match is None or int(match["length"]) > OUTPUT_MAX:
        return None
    return match["number"].decode(), int(match["status"]), int(match["length"])


class Agent:
    """The host's end of the serial port; one command at a time."""

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket."""
        self._socket = connected
        self._received = b""
        self._number = 0

    def wait_ready(self, seconds: float) -> None:
        """Wait until the guest's init script is ready.

        Raises:
            Unanswered: it is not in time, or QEMU has ended.
        """
        self._answer("ready", "boot", seconds)

    def run(self, command: str, seconds: float = 120.0, *, check: bool = True) -> Answer:
        """Run a shell command in the guest and return what it came to.

        Raises:
            Unanswered: no answer in time, or QEMU has ended.
            VmError: `check`, and the command failed; the text has its output.
            ValueError: the command does not fit into a line.
        """
        self.start(command)
        answer = self._answer(str(self._number), command, seconds)
        if check and answer.status:
            raise VmError(f"in the guest, {command!r} ended with {answer.status}: {answer.output.strip()}")
        return answer

    def read(self, command: str, seconds: float = 120.0) -> str:
        """Return the output of a command that must succeed."""
        return self.run(command, seconds).output

    def start(self, command: str) -> None:
        """Send a command without waiting; `finish` must follow before the next one."""
        line = f"{self._number + 1} {command}\n".encode()
        if b"\n" in line[:-1] or len(line) > LINE_MAX:
            raise ValueError(f"not a line of at most {LINE_MAX} bytes: {command!r}")
        self._number += 1
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise Unanswered(f"the guest's serial port is gone: {error.strerror}") from error

    def finish(self, seconds: float) -> Answer:
        """Wait for the answer to the last `start`; may be called again if it is not in time.

        Raises:
            Unanswered: no answer in time, or QEMU has ended.
        """
        return self._answer(str(self._number), "the command", seconds)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _answer(self, number: str, what: str, seconds: float) -> Answer:
        deadline = time.monotonic() + seconds
        while True:
            taken = self._take()
            if taken is None:
                self._receive(what, deadline, seconds)
            elif taken[0] == number:
                return taken[1]

    def _take(self) -> tuple[str, Answer] | None:
        """Return the next whole answer that has been received, with its number."""
        while b"\n" in self._received:
            line, _, rest = self._received.partition(b"\n")
            header = parse_header(line)
            if header is None:
                self._received = rest  # what the kernel says in an emergency comes out of every port
                continue
            number, status, length = header
            if len(rest) < length:
                return None
            self._received = rest[length:]
            return number, Answer(status, rest[:length].decode(errors="replace"))
        return None

    def _receive(self, what: str, deadline: float, seconds: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unanswered(f"the guest did not answer within {seconds:g} s: {what}")
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return
        except OSError as error:
            raise Unanswered(f"the guest's serial port is gone: {error.strerror}") from error
        if not data:
            raise Unanswered(f"QEMU has ended: {what}")
        self._received += data
