# SPDX-License-Identifier: GPL-2.0-only
"""`hostzero device` as a process of its own, as a user would start it, and its control socket."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from hostzero.errors import ControlError, UsageError, VmError
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.cpu import process_seconds
from hostzero.vm.guest import BOOT_SECONDS, Guest
from hostzero.vm.prepared import Prepared
from hostzero.vm.wait import wait_for

COMMAND: Final = (sys.executable, "-m", "hostzero", "device")
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0


class Backend:
    """A running balloon device.

    Attributes:
        log: what it says.
    """

    def __init__(self, socket: Path, features: str | None = None) -> None:
        """Start a device that listens at `socket`, and wait until it does.

        Args:
            socket: for the front end; control socket and log lie beside it.
            features: the features by name, as ``--features`` takes them; default: the device's default.

        Raises:
            VmError: it ended at once, or is not ready in time; the text has what it said.
        """
        self.log = socket.with_name("device.log")
        control = socket.with_name("control")
        arguments = ["--socket-path", str(socket), "--control", str(control)]
        if features is not None:
            arguments += ["--features", features]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._control = wait_for(
                lambda: self._connect(socket, control), "the device listens", START_SECONDS
            )
        except BaseException:
            self.kill()
            raise

    def _connect(self, socket: Path, control: Path) -> ControlClient | None:
        if self._process.poll() is not None:
            raise VmError(f"the device ended at once: {self.last_words()}")
        if not socket.exists():
            return None
        try:
            return ControlClient.open(control)
        except UsageError:
            return None  # not there yet

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used."""
        return process_seconds(self.pid)

    def request(self, command: str, **arguments: object) -> dict[str, Any]:
        """Ask its control socket; see docs/control.md.

        Raises:
            VmError: it refuses, or does not answer.
        """
        try:
            return self._control.request(command, **arguments)
        except (ControlError, UsageError) as error:
            ended = "" if self.alive else f"; the device has ended: {self.last_words()}"
            raise VmError(f"the device, {command}: {error}{ended}") from error

    def status(self) -> dict[str, Any]:
        """Return everything that it knows."""
        return self.request("status")

    def actual(self) -> int:
        """Return the balloon's size, in bytes, as the guest says."""
        return int(self.status()["device"]["actual_bytes"])

    def resize(self, balloon_bytes: int) -> None:
        """Ask the guest for a balloon of this size; returns at once."""
        self.request("resize", balloon_bytes=balloon_bytes)

    def kill(self) -> None:
        """End it without warning (SIGKILL)."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """End it as a service manager would (SIGTERM); returns its exit status."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode

    def close(self) -> None:
        """End it."""
        self._control.close()
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def guest_with_device(
    prepared: Prepared, options: GuestOptions, features: str | None = None, seconds: float = BOOT_SECONDS
) -> Iterator[tuple[Guest, Backend]]:
    """Yield a running guest and the device that serves its balloon; the driver is not loaded yet."""
    with Guest(prepared, options) as guest, Backend(guest.balloon_socket, features) as backend:
        try:
            guest.start(seconds)
        except VmError as error:
            raise VmError(f"{error}; device: {backend.last_words()}") from error
        yield guest, backend
        # QEMU before the device: to QEMU, a device that goes first is an error.
        guest.stop()
