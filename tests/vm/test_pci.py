# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.errors import VmError
from hostzero.vm.pci import bar_address, bits, common_configuration, parse_bytes


def test_the_common_configuration_is_where_the_capability_says() -> None:
    config = bytearray(256)
    config[0x34] = 0x40
    config[0x40:0x50] = bytes([9, 0, 16, 1, 4, 0, 0, 0, 0, 0x10, 0, 0, 56, 0, 0, 0])
    assert common_configuration(bytes(config)) == (4, 0x1000)


def test_a_device_without_one_is_an_error() -> None:
    with pytest.raises(VmError, match="no modern virtio device"):
        common_configuration(bytes(256))


def test_what_the_guest_prints() -> None:
    assert parse_bytes(" f4 1a\n 45 10\n") == b"\xf4\x1a\x45\x10"
    assert bar_address("0x0 0x0 0x0\n0xe0000000 0xe0003fff 0x14220c\n", 1) == 0xE000_0000
    with pytest.raises(VmError, match="BAR 2"):
        bar_address("0x0 0x0 0x0\n", 2)
    assert bits(lambda number: [0x21, 1][number]) == {0, 5, 32}
