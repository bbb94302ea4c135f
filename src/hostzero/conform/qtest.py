# SPDX-License-Identifier: GPL-2.0-only
"""QEMU's qtest protocol: a machine without a processor, whose bus somebody else drives.

Lines of text over a socket; each request is answered by one line that begins with ``OK`` or
``FAIL`` (QEMU: `system/qtest.c`, `qtest_process_command`). Numbers are hexadecimal.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, Protocol

from hostzero.errors import TargetError

ANSWER_SECONDS: Final = 10.0
"""How long QEMU may take for one access; a device that loops for ever takes longer."""

_WIDTHS: Final = {1: "b", 2: "w", 4: "l"}
_CHUNK: Final = 4096


class Bus(Protocol):
    """What can be reached of a machine: I/O ports and physical addresses."""

    def outl(self, port: int, value: int) -> None:
        """Write 32 bits to an I/O port."""
        ...

    def inl(self, port: int) -> int:
        """Read 32 bits from an I/O port."""
        ...

    def write(self, address: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes at a physical address as one little endian access."""
        ...

    def read(self, address: int, width: int) -> int:
        """Read 1, 2 or 4 bytes at a physical address as one little endian access."""
        ...


class Qtest:
    """One qtest session.

    Every call raises `TargetError` if QEMU has ended, does not answer in time or refuses.
    """

    def __init__(
        self, connected: socket.socket, gone: Callable[[], str], seconds: float = ANSWER_SECONDS
    ) -> None:
        """Talk over a connected socket, which belongs to this object from now on.

        Args:
            connected: the other end is QEMU's.
            gone: says what became of QEMU, for an error.
            seconds: how long it may take for one answer.
        """
        self._socket = connected
        self._socket.settimeout(seconds)
        self._gone = gone
        self._seconds = seconds
        self._received = b""

    def outl(self, port: int, value: int) -> None:
        """Write 32 bits to an I/O port."""
        self._command(f"outl {port:#x} {value:#x}")

    def inl(self, port: int) -> int:
        """Read 32 bits from an I/O port."""
        return self._number(f"inl {port:#x}")

    def write(self, address: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes at a physical address."""
        self._command(f"write{_WIDTHS[width]} {address:#x} {value:#x}")

    def read(self, address: int, width: int) -> int:
        """Read 1, 2 or 4 bytes at a physical address."""
        return self._number(f"read{_WIDTHS[width]} {address:#x}")

    def close(self) -> None:
        """End the session."""
        self._socket.close()

    def _number(self, line: str) -> int:
        answer = self._command(line)
        try:
            return int(answer, 16)
        except ValueError:
            raise TargetError(f"QEMU answers {line!r} with {answer!r}") from None

    def _command(self, line: str) -> str:
        try:
            self._socket.sendall(line.encode() + b"\n")
            answer = self._line()
        except TimeoutError:
            raise TargetError(f"QEMU does not answer {line!r} within {self._seconds:g} s") from None
        except OSError as error:
            raise TargetError(self._gone()) from error
        kind, _, rest = answer.partition(" ")
        if kind != "OK":
            raise TargetError(f"QEMU answers {line!r} with {answer!r}")
        return rest

    def _line(self) -> str:
        while b"\n" not in self._received:
            more = self._socket.recv(_CHUNK)
            if not more:
                raise TargetError(self._gone())
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()
