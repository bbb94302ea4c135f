# SPDX-License-Identifier: GPL-2.0-only
"""The balloon's configuration space as the driver reads and writes it (virtio 1.3, 5.5.4).

Whatever the device says here is only a wish: `num_pages` may exceed the guest's RAM, and any
32-bit value may turn up as a command id.
"""

from __future__ import annotations

from hostzero.errors import DriverError
from hostzero.virtio.balloon import (
    CONFIG_ACTUAL,
    CONFIG_FREE_PAGE_HINT_CMD_ID,
    CONFIG_NUM_PAGES,
    CONFIG_POISON_VAL,
)
from hostzero.virtio.transport import Transport

_FIELD = 4


class ConfigSpace:
    """The four little-endian 32-bit fields, by name."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def num_pages(self) -> int:
        """Return the balloon size that the host wants, in pages of 4 KiB."""
        return self._read(CONFIG_NUM_PAGES, "num_pages")

    def free_page_hint_cmd_id(self) -> int:
        """Return the hinting command; only there if FREE_PAGE_HINT was negotiated."""
        return self._read(CONFIG_FREE_PAGE_HINT_CMD_ID, "free_page_hint_cmd_id")

    def write_actual(self, pages: int) -> None:
        """Tell the host the size of the balloon, in pages of 4 KiB."""
        self._write(CONFIG_ACTUAL, pages)

    def write_poison_val(self, value: int) -> None:
        """Tell the host what freed pages hold; only if PAGE_POISON was negotiated."""
        self._write(CONFIG_POISON_VAL, value)

    def _read(self, offset: int, name: str) -> int:
        data = self._transport.read_config(offset, _FIELD)
        if len(data) != _FIELD:
            raise DriverError(f"the device returned {len(data)} bytes for {name}, which has {_FIELD}")
        return int.from_bytes(data, "little")

    def _write(self, offset: int, value: int) -> None:
        self._transport.write_config(offset, value.to_bytes(_FIELD, "little"))
