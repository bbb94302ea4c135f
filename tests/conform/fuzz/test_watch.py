# SPDX-License-Identifier: GPL-2.0-only
"""What is seen of a process from outside, on small processes that do as they are told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostzero.conform.fuzz import watch as watch_module
from hostzero.conform.fuzz.arena import FILE_NAME
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.conform.fuzz.watch import LOG_BYTES_MAX, SESSION_FDS_MAX, WARM_EPISODES, Watch
from hostzero.errors import UsageError
from tests.conform.fuzz import fakes

PROGRAM = f"""
import ctypes, os, sys
held = []
def hold(count):
    held.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(count))
def drop():
    while held: os.close(held.pop())
def map_memory():
    fd = os.memfd_create("{FILE_NAME}")
    os.truncate(fd, 1 << 20)
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 5
    libc.mmap(None, 1 << 20, 3, 1, fd, 0)
    os.close(fd)
def log(size):
    sys.stderr.write("x" * size)
    sys.stderr.flush()
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Process:
    """A process that is told what to do."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-S", "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.pid = self.popen.pid
        self._hear("ready\n")

    def do(self, code: str) -> None:
        """Have it run a line of code."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(code + "\n")
        self.popen.stdin.flush()
        self._hear("done\n")

    def end(self) -> None:
        """End it, and leave nothing of it in /proc."""
        self.popen.kill()
        self.popen.communicate()

    def _hear(self, what: str) -> None:
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline() == what


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path / "log")
    yield made
    made.end()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lives in these tests lives on, and what has died has died already."""
    monkeypatch.setattr(watch_module, "ENDING", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "PATIENCE", 0.05)


def found(call: Callable[[], Any]) -> tuple[Kind, str]:
    with pytest.raises(Found) as caught:
        call()
    return caught.value.kind, str(caught.value)


# ---------------------------------------------------------------------------- alive


def test_a_process_that_does_nothing_is_as_it_was(process: Process) -> None:
    watch = Watch(process.pid, None)
    assert watch.notes == ["no --control: not checked that status is answered"]
    for _ in range(WARM_EPISODES + 5):
        watch.alive()
        watch.busy()
        watch.settled()
    assert watch.status() == {}
    watch.fresh_status()
    watch.close()


def looks(watch: Watch) -> list[Callable[[], None]]:
    return [watch.alive, watch.busy, watch.settled, lambda: watch.alive_or_silent(OSError("what was seen"))]


def test_a_process_that_is_gone(process: Process) -> None:
    watch = Watch(process.pid, None)
    assert watch.figures()
    process.end()
    for look in looks(watch):
        assert found(look) == (Kind.DIED, f"process {process.pid} is gone")
    assert watch.figures() == {}


def test_a_process_that_nobody_has_waited_for(process: Process) -> None:
    watch = Watch(process.pid, None)
    process.popen.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for look in looks(watch):
        assert found(look) == (Kind.DIED, f"process {process.pid} has ended")
    assert watch.figures() == {}


def test_another_process_of_the_same_number(process: Process) -> None:
    watch = Watch(process.pid, None)
    watch._birth = "1"
    assert found(watch.alive)[0] is Kind.DIED


@pytest.mark.parametrize("look", ["busy", "settled"])
def test_a_process_that_ends_between_two_looks(
    process: Process, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    watch = Watch(process.pid, None)
    monkeypatch.setattr(watch, "alive", process.end)  # it was still there
    assert found(getattr(watch, look)) == (Kind.DIED, f"process {process.pid} is gone")


def test_a_process_may_call_itself_what_it_likes(process: Process) -> None:
    watch = Watch(process.pid, None)
    process.do("open('/proc/self/comm', 'w').write('x) Z 1 (')")
    watch.alive()


def test_what_was_seen_stands_while_the_process_lives(process: Process) -> None:
    Watch(process.pid, None).alive_or_silent(OSError("what was seen"))


# ---------------------------------------------------------------------------- descriptors and memory


def test_descriptors_are_named(process: Process) -> None:
    watch = Watch(process.pid, None)
    before = watch.descriptors()
    process.do("hold(1)")
    (new,) = set(watch.descriptors().items()) - set(before.items())
    assert new[1] == "/dev/null"


def test_a_session_may_hold_some_descriptors_and_not_any_number(process: Process) -> None:
    watch = Watch(process.pid, None)
    before = len(watch.descriptors())
    process.do(f"hold({SESSION_FDS_MAX})")
    watch.busy()
    process.do("hold(1)")
    assert found(watch.busy) == (
        Kind.DESCRIPTORS,
        f"{before + SESSION_FDS_MAX + 1} descriptors are held in one session, {before} without",
    )


def test_a_descriptor_that_is_left_is_named(process: Process, impatient: None) -> None:
    watch = Watch(process.pid, None)
    before = len(watch.descriptors())
    process.do("hold(1)")
    kind, text = found(watch.settled)
    assert kind is Kind.DESCRIPTORS
    assert text.startswith(f"{before + 1} descriptors are open, {before} before: ")
    assert text.endswith(": /dev/null")


def test_a_process_has_time_to_settle(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(process.pid, None)
    process.do("hold(3)")
    monkeypatch.setattr("hostzero.conform.fuzz.watch.time.sleep", lambda _seconds: process.do("drop()"))
    watch.settled()


def test_guest_memory_that_stays_mapped(process: Process, impatient: None) -> None:
    watch = Watch(process.pid, None)
    process.do("map_memory()")
    process.do("map_memory()")
    assert found(watch.settled) == (Kind.MAPPINGS, "2 regions of guest memory are still mapped")


def test_a_process_may_grow_while_it_is_cold_and_not_later(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "GROWTH_MAX", 4 << 20)
    watch = Watch(process.pid, None)
    for _ in range(WARM_EPISODES - 1):
        watch.settled()
    process.do("held.append('x' * (16 << 20))")
    for _ in range(3):
        watch.settled()
    before = watch.figures()["anonymous_bytes"]
    assert before > 16 << 20
    process.do("held.append('x' * (16 << 20))")
    assert found(watch.settled) == (Kind.MEMORY, "the process has grown by 16 MiB since it was warm")
    assert watch.figures()["anonymous_bytes"] >= before + (16 << 20)


# ---------------------------------------------------------------------------- the log


def test_a_log_may_grow_slowly(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("hostzero.conform.fuzz.watch.time.monotonic", lambda: now[0])
    process.do("log(1000)")
    watch = Watch(process.pid, None)
    process.do(f"log({LOG_BYTES_MAX})")
    watch.settled()
    assert watch.figures()["log_bytes"] == LOG_BYTES_MAX
    process.do("log(1)")
    assert found(watch.settled) == (Kind.LOG, f"{LOG_BYTES_MAX + 1} bytes of log in 0.0 minutes")
    now[0] = 60.0
    watch.settled()
    process.do(f"log({LOG_BYTES_MAX})")
    assert found(watch.settled) == (Kind.LOG, f"{2 * LOG_BYTES_MAX + 1} bytes of log in 1.0 minutes")


def test_a_log_that_is_no_file_is_not_looked_at(tmp_path: Path) -> None:
    process = Process(Path("/dev/null"))
    watch = Watch(process.pid, None)
    process.do(f"log({2 * LOG_BYTES_MAX})")
    watch.settled()
    assert "log_bytes" not in watch.figures()
    assert watch.notes[-1] == "the backend's standard error is no file: the log is not checked"
    process.end()


# ---------------------------------------------------------------------------- processes that cannot be seen


UNSEEN = "the backend's process cannot be seen: descriptors, memory and log not checked"


@pytest.mark.parametrize("pid", [None, 0, 1 << 30])
def test_a_process_that_is_not_here(pid: int | None) -> None:
    watch = Watch(pid, None)
    assert watch.pid is None
    assert watch.notes[-1] == UNSEEN
    watch.alive()
    watch.busy()
    watch.settled()
    watch.alive_or_silent(OSError())
    assert watch.figures() == {}


def test_a_process_of_another_user(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # what root is never told
    watch = Watch(process.pid, None)
    assert watch.notes[-1] == UNSEEN
    watch.settled()


# ---------------------------------------------------------------------------- the control socket


def test_the_control_socket_says_which_process_it_is(process: Process, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    with (
        fakes.control(path, lambda _line: fakes.status(pid=process.pid, session=None)),
        contextlib.closing(Watch(1 << 30, path)) as watch,
    ):
        assert watch.pid == process.pid
        assert watch.notes == []
        assert watch.status() == {"pid": process.pid, "session": None}
        watch.fresh_status()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "the device closed the connection: it has ended, or it is no hostzero device"),
        (b"?\n", "the answer is none of a hostzero device: is this its control socket?"),
        (fakes.status(), "its status names no process"),
        (fakes.status(pid="seven"), "its status names no process"),
        (fakes.status(pid=None), "its status names no process"),
    ],
)
def test_a_control_socket_of_somebody_else(tmp_path: Path, answer: bytes, why: str) -> None:
    path = tmp_path / "ctl"
    with fakes.control(path, lambda _line: answer), pytest.raises(UsageError) as caught:
        Watch(None, path)
    assert str(caught.value) == f"--control {path}: {why}"


def test_no_control_socket(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such socket"):
        Watch(os.getpid(), tmp_path / "ctl")


@pytest.mark.parametrize("look", ["status", "fresh_status"])
def test_an_answer_that_is_none_is_found(process: Process, tmp_path: Path, look: str) -> None:
    path = tmp_path / "ctl"
    answers = [fakes.status(pid=process.pid), b"?\n"]
    with fakes.control(path, lambda _line: answers.pop(0)), contextlib.closing(Watch(None, path)) as watch:
        kind, text = found(getattr(watch, look))
    assert kind is Kind.STATUS
    assert "the answer is none of a hostzero device" in text
    assert text.startswith("a new client: ") == (look == "fresh_status")


def test_a_control_socket_that_is_not_there_any_more(process: Process, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    with fakes.control(path, lambda _line: fakes.status(pid=process.pid)):
        watch = Watch(None, path)
    assert found(watch.fresh_status)[0] is Kind.STATUS
    watch.close()


@pytest.mark.parametrize("look", ["status", "fresh_status"])
def test_a_process_that_has_died_is_told_before_its_silence(
    process: Process, tmp_path: Path, look: str
) -> None:
    path = tmp_path / "ctl"
    answers = [fakes.status(pid=process.pid), b""]
    with fakes.control(path, lambda _line: answers.pop(0)), contextlib.closing(Watch(None, path)) as watch:
        process.end()
        assert found(getattr(watch, look))[0] is Kind.DIED
