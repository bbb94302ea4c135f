# SPDX-License-Identifier: GPL-2.0-only
"""CPU time that other processes and their threads have used, in seconds, to the nanosecond."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from hostzero.errors import VmError

_SCHED_CLOCK: Final = 2  # CPUCLOCK_SCHED of the kernel's posix-timers.h
_NS: Final = 1e-9
_PROC: Final = Path("/proc")


def process_seconds(pid: int) -> float:
    """Return the CPU time of a process with all its threads, those that have ended too.

    The process's CPU clock, as clock_getcpuclockid(3) numbers it.

    Raises:
        VmError: there is no such process.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | _SCHED_CLOCK) * _NS
    except OSError as error:
        raise VmError(f"the process {pid} has ended") from error


def thread_seconds(pid: int, tid: int, root: Path = _PROC) -> float:
    """Return the CPU time of one thread (the main thread's `tid` is `pid`).

    Raises:
        VmError: there is no such thread, or the kernel keeps no schedstat.
    """
    return _schedstat(pid, tid, root)[0]


def thread_waited(pid: int, tid: int, root: Path = _PROC) -> float:
    """Return for how long one thread has been ready to run while something else had the CPU.

    Raises:
        VmError: as `thread_seconds`.
    """
    return _schedstat(pid, tid, root)[1]


def threads(pid: int, root: Path = _PROC) -> list[int]:
    """Return the numbers of a process's threads.

    Raises:
        VmError: there is no such process.
    """
    try:
        return sorted(int(entry.name) for entry in (root / str(pid) / "task").iterdir())
    except OSError as error:
        raise VmError(f"the process {pid} has ended") from error


# Documentation/scheduler/sched-stats.rst: time on a CPU, time in a run queue, timeslices; in ns.
def _schedstat(pid: int, tid: int, root: Path) -> tuple[float, float]:
    try:
        ran, waited, _ = (root / str(pid) / "task" / str(tid) / "schedstat").read_text().split()
    except OSError as error:
        raise VmError(f"no CPU time of thread {tid} of process {pid}: {error.strerror}") from error
    return int(ran) * _NS, int(waited) * _NS
