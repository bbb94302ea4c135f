# SPDX-License-Identifier: GPL-2.0-only
"""Starting and ending a QEMU, with a stand-in for it that is started through a careless wrapper script."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostzero.conform import qemu_process
from hostzero.conform.in_process import HIGH_BYTES, LOW_BYTES
from hostzero.conform.qemu import command_line
from hostzero.conform.qemu_process import QemuProcess, ask
from hostzero.errors import TargetError, UsageError
from hostzero.ram import Ram, open_ram
from tests.conform.stand_in_qemu import VERSION, script


@pytest.fixture
def ram() -> Iterator[Ram]:
    with open_ram(LOW_BYTES + HIGH_BYTES, "memfd") as ram:
        yield ram


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that are started, which lead groups of their own."""
    popen = subprocess.Popen
    found: list[int] = []

    def noting(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **options)
        found.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", noting)
    return found


def words(ram: Ram) -> list[str]:
    return command_line(f"/proc/{os.getpid()}/fd/{ram.fileno}")


def processes_of(group: int) -> list[int]:
    """The processes of a group that are still there, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(pgrp) == group and state != "Z":
                found.append(int(folder.name))
    return found


def expect_gone(group: int) -> None:
    deadline = time.monotonic() + 10
    while left := processes_of(group):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.01)


def test_it_runs_is_asked_and_is_gone_with_all_of_its_group(tmp_path: Path, ram: Ram) -> None:
    before = set(Path(tempfile.gettempdir()).glob("hostzero-qemu-*"))
    with QemuProcess(str(script(tmp_path)), words(ram)) as process:
        group = process._process.pid  # type: ignore[union-attr]
        assert len(processes_of(group)) == 2  # the script and what it started
        assert set(Path(tempfile.gettempdir()).glob("hostzero-qemu-*")) <= before
        process.qtest.outl(0xCF8, 0x8000_2000)
        assert process.qtest.inl(0xCFC) == 0x1045_1AF4
        assert process.qmp("query-status") == {}
        with pytest.raises(TargetError, match="monitor, migrate: The command migrate has not been found"):
            process.qmp("migrate", uri="nowhere")
        assert not process.ended
    expect_gone(group)
    process.stop()


def test_a_qemu_that_is_killed_is_said_to_be(tmp_path: Path, ram: Ram) -> None:
    with QemuProcess(str(script(tmp_path)), words(ram)) as process:
        group = process._process.pid  # type: ignore[union-attr]
        os.killpg(group, signal.SIGKILL)
        with pytest.raises(TargetError, match=r"QEMU ended \(signal SIGKILL\)"):
            process.qtest.inl(0xCFC)
        with pytest.raises(TargetError, match=r"QEMU ended \(signal SIGKILL\)"):
            process.qmp("query-status")
        assert process.ended
    expect_gone(group)


def test_a_qemu_that_does_not_want_to_start_is_a_usage_error(tmp_path: Path, ram: Ram) -> None:
    program = str(script(tmp_path, "refuse"))
    with pytest.raises(UsageError, match=r"does not start: QEMU ended \(exit status 1\): .*invalid option"):
        QemuProcess(program, words(ram))


def test_a_program_that_never_connects_is_a_usage_error(
    tmp_path: Path, ram: Ram, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    monkeypatch.setattr(qemu_process, "CONNECT_SECONDS", 0.3)
    with pytest.raises(UsageError, match=r"did not connect within 0\.3 s"):
        QemuProcess(str(script(tmp_path, "mute")), words(ram))
    expect_gone(started[0])


def test_a_program_that_cannot_be_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not run"):
        QemuProcess(str(tmp_path), [])


def test_a_signal_waits_until_the_process_is_known(
    tmp_path: Path, ram: Ram, monkeypatch: pytest.MonkeyPatch, started: list[int]
) -> None:
    noted = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = noted(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QemuProcess(str(script(tmp_path)), words(ram))
    expect_gone(started[0])


def test_asking(tmp_path: Path) -> None:
    assert ask(str(script(tmp_path)), "--version") == f"{VERSION}\n"
    with pytest.raises(UsageError, match="does not run: qemu: -nonsense: invalid option"):
        ask(str(script(tmp_path)), "-nonsense", "yes")
    with pytest.raises(UsageError, match="does not run"):
        ask(str(tmp_path / "nowhere"), "--version")
