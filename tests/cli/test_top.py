# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero top``: for scripts, for a pipe, and on a terminal that has to be clean afterwards."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostzero.cli.main import run

PATIENCE = 30.0
"""Seconds after which a process that does nothing has failed; none of the tests takes that long."""

LEAVE_VIEW = b"\x1b[?1049l"
SHOW_CURSOR = b"\x1b[?25h"


def top(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hostzero", "top", *arguments]


class Terminal:
    """A pseudo-terminal with ``hostzero top`` on it."""

    def __init__(self, control: Path) -> None:
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(self.ours)
        self.shown = b""
        self.process = subprocess.Popen(
            top(str(control), "--interval", "0.1"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        )
        os.close(theirs)

    def read_until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 0.05)[0]:
                try:
                    self.shown += os.read(self.ours, 1 << 16)
                except OSError:  # the last process has closed the terminal
                    return

    def end(self) -> int:
        self.read_until(lambda: self.process.poll() is not None)
        self.read_until(lambda: not select.select([self.ours], [], [], 0)[0])
        return self.process.wait(PATIENCE)


@pytest.fixture
def terminal(control: Path) -> Iterator[Terminal]:
    opened = Terminal(control)
    try:
        opened.read_until(lambda: opened.shown.count(b"given back") >= 2)
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.ours)


# ------------------------------------------------------------- for scripts


def test_once(control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", str(control), "--once"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("given back") == 1
    assert "malformed requests, inflate" in shown.out
    assert "\x1b" not in shown.out
    assert shown.err == ""


def test_once_as_json(control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", str(control), "--once", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["time"] > 1_700_000_000
    assert document["device"]["live"] is True


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_pipe_gets_look_after_look(control: Path, arguments: list[str]) -> None:
    with subprocess.Popen(
        top(str(control), "--interval", "0.1", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if arguments:
            first, second = (json.loads(process.stdout.readline()) for _ in range(2))
            requests = [each["metrics"]["device"]["inflate"]["requests"] for each in (first, second)]
            assert requests[0] < requests[1]
            assert first["time"] < second["time"]
        else:
            looks = 0
            while looks < 2:
                looks += "given back" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == "hostzero top: interrupted\n"


def test_a_look_asks_for_the_statistics_of_the_next(control: Path) -> None:
    with subprocess.Popen(
        top(str(control), "--interval", "0.1", "--json"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        updates = [
            json.loads(process.stdout.readline())["metrics"]["device"]["stats_updates"] for _ in range(5)
        ]
        process.kill()
    assert updates[0] == 1
    assert updates[-1] > 1


def test_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", str(tmp_path / "ctl")]) == 2
    assert "there is no such socket" in capsys.readouterr().err


# ------------------------------------------------------------- on a terminal


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("q", 0),
        ("ctrl-c", 0),
        ("sigterm", 128 + signal.SIGTERM),
        ("sighup", 128 + signal.SIGHUP),
    ],
)
def test_the_terminal_is_as_it_was(terminal: Terminal, way: str, status: int) -> None:
    assert termios.tcgetattr(terminal.ours) != terminal.before, "keys are read one by one"
    if way == "q":
        os.write(terminal.ours, b"xq")
    else:
        number = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP}[way]
        terminal.process.send_signal(number)
    assert terminal.end() == status
    assert LEAVE_VIEW in terminal.shown
    assert terminal.shown.rindex(SHOW_CURSOR) > terminal.shown.rindex(b"\x1b[?25l")
    assert b"Traceback" not in terminal.shown
    assert termios.tcgetattr(terminal.ours) == terminal.before


def test_ctrl_z_does_not_leave_the_view_half_way(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGTSTP)
    seen = len(terminal.shown)
    terminal.read_until(lambda: b"given back" in terminal.shown[seen:])
    os.write(terminal.ours, b"q")
    assert terminal.end() == 0


def test_a_device_that_ends(terminal: Terminal, device_process: tuple[Path, subprocess.Popen[str]]) -> None:
    device_process[1].kill()
    assert terminal.end() == 1
    after = terminal.shown[terminal.shown.rindex(LEAVE_VIEW) :]
    assert b"hostzero top: error: the device closed the connection" in after
    assert termios.tcgetattr(terminal.ours) == terminal.before
