# SPDX-License-Identifier: GPL-2.0-only
"""The device as a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hostzero.errors import VmError
from hostzero.vm import backend as module
from hostzero.vm.backend import Backend, guest_with_device
from hostzero.vm.command_line import GuestOptions
from tests.vm.stand_in import MIB, prepared_with, write_qemu


def test_a_device_listens_answers_and_ends(tmp_path: Path) -> None:
    with Backend(tmp_path / "balloon", "-reporting,-device-init-reported") as device:
        assert device.alive
        assert (tmp_path / "balloon").is_socket()
        assert device.status()["session"] is None
        assert "reporting" not in device.status()["device"]["features_offered"]
        assert device.actual() == 0
        device.resize(8 * MIB)
        assert device.status()["device"]["target_bytes"] == 8 * MIB
        assert device.cpu_seconds() > 0
        with pytest.raises(VmError, match="the device, dance: "):
            device.request("dance")
        assert device.stop() == 0
    assert not device.alive


def test_a_device_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(VmError, match=r"ended at once: .*nonsense"):
        Backend(tmp_path / "balloon", "+nonsense")


def test_a_device_that_never_listens_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(module, "START_SECONDS", 1.0)
    with pytest.raises(VmError, match="the device listens: not within 1 s"):
        Backend(tmp_path / "balloon")
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_device_that_was_killed_is_said_to_have_ended(tmp_path: Path) -> None:
    with Backend(tmp_path / "balloon") as device:
        device.kill()
        with pytest.raises(VmError, match="the device has ended"):
            device.status()


def test_a_guest_and_its_device_end_together(tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu"))
    with guest_with_device(prepared, GuestOptions(memory=64 * MIB), seconds=30) as (guest, device):
        assert device.alive
        assert device.log.parent == guest.folder
        process = guest.pid
    assert not device.alive
    assert not Path(f"/proc/{process}").exists()
    assert not guest.folder.exists()


def test_a_guest_that_does_not_start_takes_its_device_along(tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu", mode="refuses"))
    start = guest_with_device(prepared, GuestOptions(memory=64 * MIB), seconds=30)
    with pytest.raises(VmError, match=r"not a device; device: it said nothing"), start:
        pytest.fail("it did not start")
