# SPDX-License-Identifier: GPL-2.0-only
"""Fuzzing against real processes: nothing is found in the device, and each defect is in a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.conform.fuzz.finding import Kind
from hostzero.conform.fuzz.run import FuzzReport, fuzz
from hostzero.errors import UsageError
from tests.conform.backend import running
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


def test_a_backend_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend listens there"):
        fuzz(tmp_path / "none.sock", seconds=1.0, seed=1)
