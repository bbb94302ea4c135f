# SPDX-License-Identifier: GPL-2.0-only
"""QEMU's own `virtio-balloon-pci`, steered over QMP as hostzero's device is over its control socket.

QMP counts the other way round: ``balloon`` takes what the guest keeps, and ``query-balloon`` says
what it has. Here both are the balloon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import BOOT_SECONDS, Guest
from hostzero.vm.prepared import Prepared


class QemuBalloon:
    """The balloon of a running guest that was started with `GuestOptions.qemu`."""

    def __init__(self, guest: Guest) -> None:
        """Steer the balloon of `guest`."""
        self._guest = guest

    def resize(self, balloon_bytes: int) -> None:
        """Ask the guest for a balloon of this size; returns at once.

        Raises:
            VmError: QEMU refuses, or has ended.
        """
        self._guest.qmp("balloon", value=self._guest.options.memory - balloon_bytes)

    def actual(self) -> int:
        """Return the balloon's size, in bytes, as the guest says.

        Raises:
            VmError: there is no driver, or QEMU has ended.
        """
        return self._guest.options.memory - int(self._guest.qmp("query-balloon")["actual"])


@contextmanager
def guest_with_qemu_balloon(
    prepared: Prepared, options: GuestOptions, seconds: float = BOOT_SECONDS
) -> Iterator[tuple[Guest, QemuBalloon]]:
    """Yield a running guest and its balloon, which is QEMU's; the driver is not loaded yet."""
    with Guest(prepared, options) as guest:
        guest.start(seconds)
        yield guest, QemuBalloon(guest)
