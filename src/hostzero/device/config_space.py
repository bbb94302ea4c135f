# SPDX-License-Identifier: GPL-2.0-only
"""The configuration space: 16 bytes, of which the driver may write two fields.

A vhost-user front end writes the whole space whenever the guest writes one field, and what it
sends for `num_pages` is old whenever the target has moved since it last read. So a write is
taken apart: `actual` and, where it is allowed, `poison_val` are kept, everything else is
dropped without complaint (virtio 1.3, 5.5.4).
"""

from __future__ import annotations

from dataclasses import dataclass

from hostzero.errors import DeviceError
from hostzero.virtio.balloon import CMD_ID_STOP, CONFIG, BalloonConfig


@dataclass
class ConfigSpace:
    """The fields that the device keeps; the command id of free page hinting is passed in.

    Attributes:
        num_pages: the target in 4 KiB pages; only the host changes it.
        actual: what the driver says is in the balloon, in 4 KiB pages. It is a number that a
            guest wrote and proves nothing.
        poison_val: the value with which the guest fills free pages. It may arrive before the
            features are decided, and survives that.
    """

    num_pages: int = 0
    actual: int = 0
    poison_val: int = 0

    def read(self, offset: int, length: int, cmd_id: int = CMD_ID_STOP) -> bytes:
        """Return bytes of the space.

        Raises:
            DeviceError: they are not all inside it.
        """
        _check_range("read", offset, length)
        return self._pack(cmd_id)[offset : offset + length]

    def write(self, offset: int, data: bytes, *, poison_writable: bool) -> None:
        """Take what the driver may write from a write to any part of the space.

        Raises:
            DeviceError: the write is not all inside the space; nothing was taken.
        """
        _check_range("write", offset, len(data))
        space = bytearray(self._pack(CMD_ID_STOP))
        space[offset : offset + len(data)] = data
        written = BalloonConfig.unpack(bytes(space))
        self.actual = written.actual
        if poison_writable:
            self.poison_val = written.poison_val

    def reset(self) -> None:
        """Forget what the driver wrote; the target is the host's and stays.

        After a reset no page is in the balloon, so `actual` is 0 until a driver says otherwise.
        """
        self.actual = 0
        self.poison_val = 0

    def _pack(self, cmd_id: int) -> bytes:
        return BalloonConfig(self.num_pages, self.actual, cmd_id, self.poison_val).pack()


def _check_range(what: str, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > CONFIG.size:
        raise DeviceError(
            f"a {what} of {length} bytes at {offset} leaves the configuration space of {CONFIG.size} bytes"
        )
