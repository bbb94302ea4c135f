# SPDX-License-Identifier: GPL-2.0-only
"""A machine's life, with a stand-in for QEMU (`tests.vm.stand_in`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.errors import VmError
from hostzero.vm.agent import Unanswered
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import Guest, State
from hostzero.vm.wait import wait_for
from tests.vm.stand_in import MIB, prepared_with, write_qemu

SLOT = "cd /sys/bus/pci/devices/0000:00:06.0 && echo virtio*"
ANSWERS = {
    "echo hello": "hello\n",
    "insmod /virtio_balloon.ko": "",
    SLOT: "virtio3\n",
    "cat /sys/bus/virtio/devices/virtio3/features": "0110010000",
    "grep '^nr_balloon_pages ' /proc/vmstat": "nr_balloon_pages 77\n",
}
OPTIONS = GuestOptions(memory=64 * MIB, hostzero=False, qemu=True)


def machine(tmp_path: Path, mode: str = "") -> Guest:
    return Guest(prepared_with(tmp_path, write_qemu(tmp_path / "qemu", mode=mode, answers=ANSWERS)), OPTIONS)


def test_a_machine_runs_from_start_to_close_and_leaves_nothing(tmp_path: Path) -> None:
    with machine(tmp_path) as guest:
        states = [guest.state]
        guest.start(30)
        states.append(guest.state)
        assert states == [State.NEW, State.RUNNING]
        assert guest.agent.read("echo hello") == "hello\n"
        guest.load_driver()
        assert guest.acked_features("qemu") == {1, 2, 5}
        assert guest.balloon_pages() == 77
        assert guest.qmp("query-status") == {"status": "running"}
        assert (guest.memory.size, guest.memory.backed()) == (64 * MIB, 0)
        process = guest.pid
        with pytest.raises(VmError, match="starts once"):
            guest.start()
    assert guest.state is State.ENDED
    assert not Path(f"/proc/{process}").exists()
    assert not guest.folder.exists()


def test_a_command_that_the_monitor_does_not_know_is_said(tmp_path: Path) -> None:
    with machine(tmp_path) as guest:
        guest.start(30)
        with pytest.raises(VmError, match="QEMU's monitor, dance: no dance"):
            guest.qmp("dance")


def test_a_qemu_that_ends_at_once_says_why(tmp_path: Path) -> None:
    with machine(tmp_path, "refuses") as guest, pytest.raises(VmError, match="nonsense: not a device"):
        guest.start(30)


def test_a_guest_that_does_not_boot_has_a_deadline(tmp_path: Path) -> None:
    with machine(tmp_path, "silent") as guest, pytest.raises(VmError, match="did not answer within"):
        guest.start(1)


def test_a_virtual_cpu_that_stops_is_noticed_before_the_deadline(tmp_path: Path) -> None:
    with machine(tmp_path, "stuck") as guest, pytest.raises(VmError, match=r"CPU stopped \(paused\)"):
        guest.start(30)


def test_a_qemu_that_crashes_is_noticed(tmp_path: Path) -> None:
    with machine(tmp_path) as guest:
        guest.start(30)
        with pytest.raises(Unanswered):
            guest.agent.run("die", 30)
        wait_for(lambda: guest.state is State.ENDED, "the end", 30)
        with pytest.raises(VmError, match=r"not running \(signal SIGABRT\)"):
            _ = guest.pid


def test_nothing_can_be_asked_before_the_start(tmp_path: Path) -> None:
    with machine(tmp_path) as guest:
        for ask in (lambda: guest.agent, lambda: guest.pid, lambda: guest.qmp("query-status")):
            with pytest.raises(VmError, match="not running"):
                ask()
