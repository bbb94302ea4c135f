# SPDX-License-Identifier: GPL-2.0-only
"""Opening the hardware counters against machines that have them, half have them, and do not.

The kernel's end is played by files: an event's descriptor is a file of readings.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from hostzero.bench.perf_event import Counts, PerfGroup, counted, open_perf

EXCLUDE_KERNEL = 1 << 5


def reading(value: int, enabled: int, running: int) -> bytes:
    return struct.pack("=QQQ", value, enabled, running)


class FakeKernel:
    """Plays perf_event_open(2): each event is a file that holds its successive readings."""

    def __init__(self, folder: Path, *readings: bytes) -> None:
        self.folder = folder
        self.contents = b"".join(readings)
        self.refusals: list[int] = []
        self.attrs: list[bytes] = []
        self.fds: list[int] = []

    def open(self, attr: bytes) -> int:
        self.attrs.append(attr)
        if self.refusals and (code := self.refusals.pop(0)):
            raise OSError(code, os.strerror(code))
        file = self.folder / f"event{len(self.attrs)}"
        file.write_bytes(self.contents)
        self.fds.append(os.open(file, os.O_RDONLY))
        return self.fds[-1]

    def all_closed(self) -> bool:
        return not any(Path(f"/proc/self/fd/{fd}").exists() for fd in self.fds)


@pytest.fixture(autouse=True)
def ioctl(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the ioctls, which a file would refuse, and return the list of them."""
    requests: list[int] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, argument: requests.append(request))
    return requests


WORKING = (reading(0, 0, 0), reading(1000, 10, 10), reading(1000, 10, 10), reading(1500, 20, 15))


def test_a_machine_that_counts(tmp_path: Path, ioctl: list[int]) -> None:
    kernel = FakeKernel(tmp_path, *WORKING)
    group, scope = open_perf(kernel.open)
    assert scope == "user and kernel"
    assert group is not None
    ioctl.clear()
    group.start()
    assert ioctl == [0x2400, 0x2400]
    assert group.stop() == Counts(1000, 1000)  # 500, over half of the time
    assert ioctl == [0x2400, 0x2400, 0x2401, 0x2401]
    group.close()
    group.close()
    assert kernel.all_closed()


def test_the_attributes_follow_the_kernel_header(tmp_path: Path) -> None:
    """perf_event_attr: type, size, config, period, sample_type, read_format, flags (disabled)."""
    kernel = FakeKernel(tmp_path, *WORKING)
    group, _ = open_perf(kernel.open)
    assert group is not None
    group.close()
    assert [len(attr) for attr in kernel.attrs] == [64, 64]
    assert [struct.unpack_from("=IIQQQQQ", attr) for attr in kernel.attrs] == [
        (0, 64, 1, 0, 0, 3, 1),
        (0, 64, 3, 0, 0, 3, 1),
    ]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_paranoid_kernel_gives_user_counts(tmp_path: Path, code: int) -> None:
    kernel = FakeKernel(tmp_path, *WORKING)
    kernel.refusals = [code]
    group, scope = open_perf(kernel.open)
    assert scope == "user only"
    assert group is not None
    group.close()
    flags = [struct.unpack_from("=Q", attr, 40)[0] for attr in kernel.attrs]
    assert [bool(value & EXCLUDE_KERNEL) for value in flags] == [False, True, True]


def test_a_kernel_that_forbids_both_scopes_is_named(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.refusals = [errno.EACCES, errno.EACCES]
    assert open_perf(kernel.open) == (None, "not available: perf_event_open: Permission denied")


def test_a_machine_without_the_event_is_named(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.refusals = [errno.ENOENT]
    assert open_perf(kernel.open) == (None, "not available: perf_event_open: No such file or directory")
    assert len(kernel.attrs) == 1


def test_the_first_event_is_closed_when_the_second_is_refused(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, *WORKING)
    kernel.refusals = [0, errno.ENOENT]
    group, reason = open_perf(kernel.open)
    assert group is None
    assert reason.startswith("not available")
    assert len(kernel.fds) == 1
    assert kernel.all_closed()


@pytest.mark.parametrize(
    "after", [reading(0, 10, 10), reading(0, 10, 0), reading(7, 10, 0)], ids=["zero", "never ran", "odd"]
)
def test_counters_that_stay_at_zero_are_given_up(tmp_path: Path, after: bytes) -> None:
    kernel = FakeKernel(tmp_path, reading(0, 0, 0), after)
    assert open_perf(kernel.open) == (None, "not available: the counters stay at zero")
    assert kernel.all_closed()


def test_counting_is_between_two_readings() -> None:
    assert counted(reading(100, 50, 50), reading(130, 60, 60)) == 30


def test_a_count_over_part_of_the_time_is_scaled_up() -> None:
    assert counted(reading(100, 50, 50), reading(130, 60, 55)) == 60


def test_an_event_that_never_ran_has_no_count() -> None:
    assert counted(reading(5, 10, 10), reading(5, 20, 10)) is None


def test_close_takes_both_descriptors(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, *WORKING)
    PerfGroup(kernel.open(b""), kernel.open(b"")).close()
    assert kernel.all_closed()
