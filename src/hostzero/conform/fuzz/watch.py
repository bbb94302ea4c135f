# SPDX-License-Identifier: GPL-2.0-only
"""The backend as it looks from outside: alive, answering, and not growing.

Everything is read from /proc and from the control socket, so that nothing of the backend has to be
believed or changed. Where a target has no control socket, or its process cannot be seen, the
checks that need it are left out; `notes` says which.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from hostzero.conform.fuzz.arena import FILE_NAME
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.errors import ControlError, UsageError
from hostzero.vhost_user.control_client import ControlClient

PATIENCE: Final = 10.0
"""Seconds for what has to happen at all; it takes milliseconds."""

ENDING: Final = 0.5
"""Seconds that a process which closed its sockets has to be gone in, if that was its end."""

SESSION_FDS_MAX: Final = 64
"""Descriptors that a backend may hold for one session: 3 for each of 5 rings, 2 for each of 8 regions,
the connection and its channel, and a message that is under way."""

GROWTH_MAX: Final = 64 << 20
"""Bytes by which a process may grow once it has warmed up."""
WARM_EPISODES: Final = 20
"""Sessions after which a process has loaded and cached what it will."""

LOG_BYTES_MAX: Final = 64 << 10
"""Bytes of log at any time, and as many for each minute. A line has about 150."""

_LOOK_EVERY: Final = 0.002


class Watch:
    """Looks at one backend.

    Attributes:
        pid: its process; None if it cannot be seen from here.
        notes: which checks are left out, and why.
    """

    def __init__(self, pid: int | None, control: Path | None) -> None:
        """Look at an idle backend: what it holds now, it may hold after each session.

        Raises:
            UsageError: no hostzero device answers at `control`.
        """
        self.notes: list[str] = []
        self._control = control
        self._client: ControlClient | None = None
        if control is None:
            self.notes.append("no --control: not checked that status is answered")
        else:
            self._client = ControlClient.open(control, PATIENCE)
            pid = self._pid_said(self._client)
        self.pid = pid
        self._settled = 0
        self._began = time.monotonic()
        try:
            if self.pid is not None:
                self._birth = self._stat()[19]
                self._idle_fds = self.descriptors()
                self._warm = self._anonymous()
        except OSError:  # of another user, or in another container (and then perhaps 0)
            self.pid = None
        if self.pid is None:
            self.notes.append("the backend's process cannot be seen: descriptors, memory and log not checked")
            return
        self._log_at_start = self._log()
        if self._log_at_start is None:
            self.notes.append("the backend's standard error is no file: the log is not checked")

    # ------------------------------------------------------------------ checks

    def alive(self) -> None:
        """Check that the process is the one that it was."""
        if self.pid is None:
            return
        try:
            fields = self._stat()
        except OSError:
            raise Found(Kind.DIED, f"process {self.pid} is gone") from None
        if fields[0] in "ZX" or fields[19] != self._birth:
            raise Found(Kind.DIED, f"process {self.pid} has ended")

    def status(self) -> dict[str, Any]:
        """Return what the control socket says; empty without one."""
        if self._client is None:
            return {}
        try:
            return self._client.request("status")
        except (ControlError, UsageError) as error:
            self.alive_or_silent(error)
            raise Found(Kind.STATUS, str(error)) from error

    def fresh_status(self) -> None:
        """Check that a new client of the control socket is answered."""
        if self._control is None:
            return
        try:
            with ControlClient.open(self._control, PATIENCE) as client:
                client.request("status")
        except (ControlError, UsageError) as error:
            self.alive_or_silent(error)
            raise Found(Kind.STATUS, f"a new client: {error}") from error

    def alive_or_silent(self, error: Exception) -> None:
        """Check `alive`, giving a process that is just ending the time to end."""
        if self.pid is not None:
            deadline = time.monotonic() + ENDING
            while time.monotonic() < deadline:
                try:
                    self.alive()
                except Found as found:
                    raise found from error
                time.sleep(_LOOK_EVERY)

    def busy(self) -> None:
        """Check what has to hold while a session is served."""
        self.alive()
        if self.pid is None:
            return
        with self._looking():
            held = len(self.descriptors())
        if held > len(self._idle_fds) + SESSION_FDS_MAX:
            raise Found(
                Kind.DESCRIPTORS, f"{held} descriptors are held in one session, {len(self._idle_fds)} without"
            )

    def settled(self) -> None:
        """Check that a session which has ended left nothing behind; waits until it has."""
        self.alive()
        if self.pid is not None:
            with self._looking():
                self._check_settled()

    def _check_settled(self) -> None:
        most = len(self._idle_fds)
        if not _within(lambda: len(self.descriptors()) <= most):
            left = self.descriptors()
            new = sorted(f"{fd}: {what}" for fd, what in left.items() if fd not in self._idle_fds)
            raise Found(
                Kind.DESCRIPTORS, f"{len(left)} descriptors are open, {most} before: {', '.join(new[:8])}"
            )
        if not _within(lambda: not self._mapped()):
            raise Found(Kind.MAPPINGS, f"{self._mapped()} regions of guest memory are still mapped")
        self._settled += 1
        if self._settled <= WARM_EPISODES:
            self._warm = max(self._warm, self._anonymous())
        elif (grown := self._anonymous() - self._warm) > GROWTH_MAX:
            raise Found(Kind.MEMORY, f"the process has grown by {grown >> 20} MiB since it was warm")
        if self._log_at_start is not None:
            size = (self._log() or 0) - self._log_at_start
            minutes = (time.monotonic() - self._began) / 60
            if size > LOG_BYTES_MAX * (1 + minutes):
                raise Found(Kind.LOG, f"{size} bytes of log in {minutes:.1f} minutes")

    # ------------------------------------------------------------------ figures

    def figures(self) -> dict[str, int | float]:
        """Return what the process has used so far; empty if it cannot be seen or has died."""
        if self.pid is None:
            return {}
        try:
            self.alive()
            fields = self._stat()
            figures: dict[str, int | float] = {
                "descriptors": len(self.descriptors()),
                "anonymous_bytes": self._anonymous(),
                "cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            }
        except (Found, OSError):  # it has died, and that was found
            return {}
        if self._log_at_start is not None:
            figures["log_bytes"] = (self._log() or 0) - self._log_at_start
        return figures

    def descriptors(self) -> dict[int, str]:
        """Return what the process has open, by descriptor."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found[int(entry.name)] = str(entry.readlink())
            except OSError:
                continue  # closed meanwhile
        return found

    def close(self) -> None:
        """Let go of the control socket."""
        if self._client is not None:
            self._client.close()

    # ------------------------------------------------------------------ /proc

    # A process that ends between two looks takes its files in /proc with it.
    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Found(Kind.DIED, f"process {self.pid} is gone") from error

    def _pid_said(self, client: ControlClient) -> int:
        try:
            return int(client.request("status")["pid"])
        except (ControlError, UsageError, KeyError, TypeError, ValueError) as error:
            client.close()
            why = str(error) if isinstance(error, ControlError) else "its status names no process"
            raise UsageError(f"--control {self._control}: {why}") from error

    # The fields behind the name, which may hold anything: state is field 0, starttime 19.
    def _stat(self) -> list[str]:
        text = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        return text.rpartition(")")[2].split()

    def _mapped(self) -> int:
        return Path(f"/proc/{self.pid}/maps").read_text(errors="replace").count(f"/memfd:{FILE_NAME}")

    def _anonymous(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        return 0  # it has just ended; `alive` says so

    def _log(self) -> int | None:
        try:
            there = Path(f"/proc/{self.pid}/fd/2").stat()
        except OSError:
            return None
        return there.st_size if stat.S_ISREG(there.st_mode) else None


def _within(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY)
    return True
