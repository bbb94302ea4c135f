# SPDX-License-Identifier: GPL-2.0-only
"""Instructions and cache misses of the calling thread, through perf_event_open(2).

The interface is the kernel's include/uapi/linux/perf_event.h. Two events are opened
on this thread, any CPU, for user and kernel where perf_event_paranoid allows it and
for user alone where it does not. A machine can accept both and then never count, as
guests without a virtual PMU do: so a stretch of known work is counted first, and
counters that stay at zero are given up.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

_SYSCALL_NUMBERS: Final = {"x86_64": 298, "aarch64": 241, "riscv64": 241, "ppc64le": 319, "s390x": 331}

_PERF_TYPE_HARDWARE: Final = 0
_PERF_COUNT_HW_INSTRUCTIONS: Final = 1
_PERF_COUNT_HW_CACHE_MISSES: Final = 3

_PERF_ATTR_SIZE_VER0: Final = 64
_PERF_FORMAT_TOTAL_TIME_ENABLED: Final = 1 << 0
_PERF_FORMAT_TOTAL_TIME_RUNNING: Final = 1 << 1
_ATTR_DISABLED: Final = 1 << 0
_ATTR_EXCLUDE_KERNEL: Final = 1 << 5
_ATTR_EXCLUDE_HV: Final = 1 << 6
_PERF_FLAG_FD_CLOEXEC: Final = 1 << 3

_PERF_EVENT_IOC_ENABLE: Final = 0x2400
_PERF_EVENT_IOC_DISABLE: Final = 0x2401

_READING: Final = struct.Struct("=QQQ")  # value, time enabled, time running

OpenEvent = Callable[[bytes], int]
"""Opens one event from its perf_event_attr and returns a file descriptor, or raises OSError."""


class Counts(NamedTuple):
    """What one stretch counted; None where the event was never scheduled onto the hardware."""

    instructions: int | None
    cache_misses: int | None


class PerfGroup:
    """Both events, opened; counts between `start` and `stop`."""

    def __init__(self, instructions_fd: int, cache_misses_fd: int) -> None:
        """Take over two descriptors of disabled events."""
        self._fds = [instructions_fd, cache_misses_fd]
        self._before: list[bytes] = []

    def start(self) -> None:
        """Count from zero from here on."""
        self._before = [os.read(fd, _READING.size) for fd in self._fds]
        for fd in self._fds:
            fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)

    def stop(self) -> Counts:
        """Stop counting and return what was counted."""
        for fd in self._fds:
            fcntl.ioctl(fd, _PERF_EVENT_IOC_DISABLE, 0)
        after = [os.read(fd, _READING.size) for fd in self._fds]
        return Counts(*map(counted, self._before, after))

    def close(self) -> None:
        """Close the descriptors; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.pop())


def counted(before: bytes, after: bytes) -> int | None:
    """Return what was counted between two readings, or None if the event never ran.

    An event that ran for part of the time it was enabled (another user of the hardware
    took turns) is scaled up by that share, as `perf stat` does.
    """
    value, enabled, running = (
        int(end - start) for start, end in zip(_READING.unpack(before), _READING.unpack(after), strict=True)
    )
    if running == 0:
        return None
    return value if running >= enabled else round(value * enabled / running)


def open_perf(open_event: OpenEvent | None = None) -> tuple[PerfGroup | None, str]:
    """Open both events; return them and which scope they count, or None and why not.

    The scope is "user and kernel" or "user only".
    """
    open_event = open_event or _perf_event_open
    for exclude, scope in ((0, "user and kernel"), (_ATTR_EXCLUDE_KERNEL | _ATTR_EXCLUDE_HV, "user only")):
        try:
            group = _open_group(open_event, exclude)
        except OSError as error:
            if error.errno in {errno.EACCES, errno.EPERM} and not exclude:
                continue
            return None, f"not available: perf_event_open: {os.strerror(error.errno or 0)}"
        if _counts_known_work(group):
            return group, scope
        group.close()
        return None, "not available: the counters stay at zero"
    raise AssertionError("unreachable: the last scope returns")


def _open_group(open_event: OpenEvent, exclude: int) -> PerfGroup:
    instructions = open_event(_attr(_PERF_COUNT_HW_INSTRUCTIONS, exclude))
    try:
        return PerfGroup(instructions, open_event(_attr(_PERF_COUNT_HW_CACHE_MISSES, exclude)))
    except OSError:
        os.close(instructions)
        raise


def _attr(config: int, exclude: int) -> bytes:
    # type, size, config, sample_period, sample_type, read_format, the bit field; the rest stays zero
    head = struct.pack(
        "=IIQQQQQ",
        _PERF_TYPE_HARDWARE,
        _PERF_ATTR_SIZE_VER0,
        config,
        0,
        0,
        _PERF_FORMAT_TOTAL_TIME_ENABLED | _PERF_FORMAT_TOTAL_TIME_RUNNING,
        _ATTR_DISABLED | exclude,
    )
    return head.ljust(_PERF_ATTR_SIZE_VER0, b"\0")


def _counts_known_work(group: PerfGroup) -> bool:
    group.start()
    bytearray(b"\xa5") * (16 << 20)  # 16 MiB written: past the private caches of any CPU
    counts = group.stop()
    return bool(counts.instructions) and bool(counts.cache_misses)


def _perf_event_open(attr: bytes) -> int:
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    this_thread, any_cpu, no_group = 0, -1, -1
    fd = syscall(
        ctypes.c_long(number),
        ctypes.c_char_p(attr),
        ctypes.c_int(this_thread),
        ctypes.c_int(any_cpu),
        ctypes.c_int(no_group),
        ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
    )
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)
