# SPDX-License-Identifier: GPL-2.0-only
"""What happens to a guest whose device dies, or whose QEMU does."""

from __future__ import annotations

import re

from hostzero.errors import VmError
from hostzero.vm.accel import Accel
from hostzero.vm.backend import Backend, guest_with_device
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import Guest, State
from hostzero.vm.prepared import Prepared
from hostzero.vm.steps import MIB, checksum, write_random
from hostzero.vm.wait import wait_for
from tests_vm.conftest import Start

QEMU_SAYS = re.compile(r"vhost_dev_[gs]et_config: Assertion `hdev->vhost_ops' failed")
"""QEMU 11.1 aborts if the guest turns to the configuration space once the back end is gone."""

TRIES = 6


def survives_its_device(prepared: Prepared, options: GuestOptions) -> bool:
    """Kill a device while its guest inflates; return False if QEMU did not stand it and said why."""
    with guest_with_device(prepared, options) as (guest, backend):
        guest.load_driver()
        expected = write_random(guest, "/mnt/live", 64 * MIB)
        backend.resize(2048 * MIB)
        wait_for(lambda: backend.actual() > 64 * MIB, "inflating", 120)
        backend.kill()
        try:
            # The guest goes on: what it had is there, and it can have more.
            assert checksum(guest, "/mnt/live") == expected
            again = write_random(guest, "/mnt/more", 64 * MIB)
            assert checksum(guest, "/mnt/more") == again
            assert checksum(guest, "/mnt/live") == expected
            assert guest.state is State.RUNNING
            assert guest.qmp("query-status")["status"] == "running"
        except VmError:
            wait_for(lambda: guest.state is State.ENDED, "QEMU ends", 30)
            assert QEMU_SAYS.search((guest.folder / "qemu.log").read_text(errors="replace"))
            return False
    return True


def test_a_guest_outlives_its_device_and_loses_nothing(prepared: Prepared, accel: Accel) -> None:
    """Whether QEMU goes on hangs on what the guest does next, so it is tried until it does."""
    options = GuestOptions(accel=accel.name, append="quiet")
    assert any(survives_its_device(prepared, options) for _ in range(TRIES))


def test_a_device_outlives_its_guest_and_serves_the_next(prepared: Prepared, accel: Accel) -> None:
    options = GuestOptions(accel=accel.name, append="quiet")
    with Guest(prepared, options) as first, Backend(first.balloon_socket) as backend:
        first.start()
        first.load_driver()
        backend.resize(64 * MIB)
        wait_for(lambda: backend.actual() == 64 * MIB, "the first guest's balloon", 120)
        first.stop()
        wait_for(lambda: backend.status()["session"] is None, "the device notices", 30)
        with Guest(prepared, options) as second:
            second.balloon_socket.symlink_to(first.balloon_socket)
            second.start()
            second.load_driver()
            wait_for(lambda: backend.actual() == 64 * MIB, "the second guest's balloon", 120)
            assert backend.status()["metrics"]["vhost_user"]["sessions"] == 2
            second.stop()
        assert backend.stop() == 0


def test_sigterm_ends_a_device_that_serves(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        guest.stop()
    assert backend.stop() == 0
    assert not guest.folder.exists()
