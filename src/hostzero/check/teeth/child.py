# SPDX-License-Identifier: GPL-2.0-only
"""Processes that are given a time, and end with it or with us, whatever they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal; None if its time was up.
        out: what it wrote to standard output.
        err: what it wrote to standard error.
        seconds: how long it ran.
    """

    status: int | None
    out: str
    err: str
    seconds: float


class Stopped(Exception):
    """No more processes are to be started."""


class Children:
    """The processes under way, each the leader of a process group; usable from several threads."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str], timeout: float
    ) -> Ending:
        """Run a command to its end, or until its time is up; then its whole group is killed.

        Raises:
            Stopped: `stop` was called, before or meanwhile.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
        status: int | None = None
        try:
            out, err = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            _kill(process)
            out, err = process.communicate()
        finally:
            with self._lock:
                # Also what it has left behind.
                _kill(process)
                self._running.discard(process)
        if self._stopped:
            raise Stopped
        return Ending(status, out, err, time.perf_counter() - began)

    def stop(self) -> None:
        """Kill what is under way and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    # A group lives as long as any of its members, its leader or not.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
