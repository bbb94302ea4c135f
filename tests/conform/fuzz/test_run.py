# SPDX-License-Identifier: GPL-2.0-only
"""Fuzzing against real processes: nothing is found in the device, and each defect is in a wrong one."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostzero.conform.fuzz import peer
from hostzero.conform.fuzz.finding import Kind
from hostzero.conform.fuzz.run import FuzzReport, _pid_of, fuzz
from hostzero.errors import UsageError
from tests.conform.backend import running
from tests.conform.fuzz import fakes
from tests.conform.fuzz.wrong_device import DEFECTS

FOUND_AS = {
    "dies": {Kind.DIED},
    "keeps descriptors": {Kind.DESCRIPTORS},
    "grows": {Kind.MEMORY},
    "chatters": {Kind.LOG},
    "takes offence": {Kind.REFUSED},
    "drops nothing": {Kind.CLAIM},
    "drops more": {Kind.CONTENT},
    "mumbles": {Kind.STATUS},
}
LONGEST = 60.0


def sent(report: FuzzReport) -> dict[str, int]:
    return report.done


def test_nothing_is_found_in_the_device(tmp_path: Path) -> None:
    heard: list[int] = []
    with running(tmp_path) as backend:
        report = fuzz(
            backend.socket,
            seconds=4.0,
            seed=1,
            control=backend.control,
            progress=lambda _spent, episodes, _steps: heard.append(episodes),
        )
    assert report.finding is None
    assert report.episodes == len(heard) > 3
    assert report.notes == []
    assert report.answers["zero"] > 0
    assert report.figures["log_bytes"] >= 0
    assert report.to_json()["ok"]


def test_without_a_control_socket_it_says_what_is_left_out(tmp_path: Path) -> None:
    with running(tmp_path) as backend:
        report = fuzz(backend.socket, seconds=0.5, seed=2)
    assert report.ok
    assert any("--control" in note for note in report.notes)


def test_a_seed_sends_the_same_again(tmp_path: Path) -> None:
    with running(tmp_path) as backend:
        runs = [
            fuzz(backend.socket, seconds=LONGEST, seed=7, control=backend.control, episode=3)
            for _ in range(2)
        ]
    assert sent(runs[0]) == sent(runs[1])
    assert runs[0].episodes == 1


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_each_defect_is_found_for_what_it_is(defect: str, tmp_path: Path) -> None:
    program = ("-m", "tests.conform.fuzz.wrong_device", defect)
    with running(tmp_path, may_end=True, program=program) as backend:
        report = fuzz(backend.socket, seconds=LONGEST, seed=1, control=backend.control)
    assert report.finding is not None
    assert report.finding.kind in FOUND_AS[defect]
    assert report.finding.last
    assert not report.to_json()["ok"]


def test_a_death_that_leaves_nothing_is_reported(tmp_path: Path) -> None:
    """Whoever runs a backend waits for it, and then nothing is left of it in /proc."""
    program = ("-m", "tests.conform.fuzz.wrong_device", "dies")
    with running(tmp_path, may_end=True, program=program) as backend:
        waiting = threading.Thread(target=backend.process.wait)
        waiting.start()
        report = fuzz(backend.socket, seconds=LONGEST, seed=1, control=backend.control)
        waiting.join()
    assert report.finding is not None
    assert report.finding.kind is Kind.DIED
    assert report.figures == {}


def test_a_backend_is_idle_when_it_is_looked_at_first(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(path))
        listener.listen()
        looking = pool.submit(_pid_of, path)
        with listener.accept()[0] as served:
            served.settimeout(LONGEST)
            assert served.recv(1) == b""  # nothing comes, and that is said
            assert not looking.done()
        assert looking.result() == os.getpid()


def test_a_backend_that_keeps_its_end_open_is_looked_at_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "PATIENCE", 0.05)
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        assert _pid_of(path) == os.getpid()


def test_a_backend_that_accepts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "PATIENCE", 0.05)
    path = tmp_path / "sock"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(str(path))
        with pytest.raises(UsageError, match="no connection is accepted there: does it serve somebody else"):
            fuzz(path, seconds=1.0, seed=1)


def test_a_control_socket_that_is_none(tmp_path: Path) -> None:
    with (
        fakes.backend(tmp_path / "sock"),
        fakes.control(tmp_path / "ctl", lambda _line: b"?\n"),
        pytest.raises(
            UsageError, match="the answer is none of a hostzero device: is this its control socket"
        ),
    ):
        fuzz(tmp_path / "sock", seconds=1.0, seed=1, control=tmp_path / "ctl")


def test_a_backend_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend listens there"):
        fuzz(tmp_path / "none.sock", seconds=1.0, seed=1)
