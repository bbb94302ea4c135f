# SPDX-License-Identifier: GPL-2.0-only
"""When a front end hears that the configuration space has changed, and when it must not.

QEMU's notifier follows a null pointer unless a driver runs (a crash of QEMU 11.1, before DRIVER_OK
and after the driver's removal). So CONFIG_CHANGE is sent only in a window: it opens when the
first ring starts and closes when the first ring stops. Outside of it nothing is lost. A driver
reads the space when it starts; and one that was only paused is told when it goes on, if the space
is another one by then.

One race is left, and no backend can close it: a front end that stops the rings at the same moment
has not read the notification yet. It is open for as long as QEMU takes to stop a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostzero.device import BalloonDevice
from hostzero.vhost_user.backend_channel import BackendChannel
from hostzero.virtio.balloon import (
    CONFIG,
    CONFIG_ACTUAL,
    CONFIG_FREE_PAGE_HINT_CMD_ID,
    CONFIG_NUM_PAGES,
    CONFIG_POISON_VAL,
)

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics


class Announcer:
    """Passes the device's configuration changes on to one front end."""

    def __init__(self, device: BalloonDevice, metrics: ServiceMetrics) -> None:
        """Hear of the changes of `device` from now on; nobody is told yet."""
        self._device = device
        self._metrics = metrics
        self._channel: BackendChannel | None = None
        self._open = False
        self._told: bytes | None = None
        device.on_config_change(self._announce)

    def use(self, channel: BackendChannel) -> None:
        """Tell the front end over this channel, which is closed with the announcer or by the next."""
        if self._channel is not None:
            self._channel.close()
        self._channel = channel

    def open(self) -> None:
        """Begin to tell; at once if the space has changed since `shut`."""
        if self._open:
            return
        self._open = True
        if self._told is not None and self._told != self._hosts_fields():
            self._announce()

    def shut(self) -> None:
        """Tell nothing until `open`."""
        if self._open:
            self._open = False
            self._told = self._hosts_fields()

    def close(self) -> None:
        """Hear of no change any more, and close the channel."""
        self._open = False
        self._device.on_config_change(_nobody)
        if self._channel is not None:
            self._channel.close()

    def _announce(self) -> None:
        if self._open and self._channel is not None:
            self._channel.config_change()
        else:
            self._metrics.config_changes_dropped += 1

    # What the host changes, and so what a driver may have missed.
    def _hosts_fields(self) -> bytes:
        space = self._device.read_config(0, CONFIG.size)
        target = space[CONFIG_NUM_PAGES:CONFIG_ACTUAL]
        return target + space[CONFIG_FREE_PAGE_HINT_CMD_ID:CONFIG_POISON_VAL]


def _nobody() -> None:
    """Hear of a change while nobody is connected."""
