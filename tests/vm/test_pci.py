# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.errors import VmError
from hostzero.vm.pci import bar_address, bits, common_configuration, parse_bytes


def space(*capabilities: tuple[int, bytes]) -> bytes:
    """A configuration space; the first capability is at the pointer."""
    config = bytearray(256)
    config[0x34] = capabilities[0][0] if capabilities else 0
    for at, content in capabilities:
        config[at : at + len(content)] = content
    return bytes(config)


def capability(kind: int, following: int, bar: int = 0, offset: int = 0) -> bytes:
    return bytes([9, following, 16, kind, bar, 0, 0, 0]) + offset.to_bytes(4, "little") + bytes(4)


def test_the_common_configuration_is_found_along_the_list() -> None:
    config = space((0x40, capability(2, 0x60)), (0x60, b"\x11\x80"), (0x80, capability(1, 0, 4, 0x3000)))
    assert common_configuration(config) == (4, 0x3000)


@pytest.mark.parametrize("config", [space(), space((0x40, capability(2, 0x40))), space((0xF8, b"\x09\x00"))])
def test_a_list_without_one_or_without_an_end(config: bytes) -> None:
    with pytest.raises(VmError, match="no common configuration"):
        common_configuration(config)


def test_a_bar_s_address_is_the_first_number_of_its_line() -> None:
    resource = "0x0 0x0 0x0\n0x00000000febf1000 0x00000000febf1fff 0x0000000000040200\n"
    assert bar_address(resource, 1) == 0xFEBF1000
    for bar in (0, 2):
        with pytest.raises(VmError, match=f"BAR {bar} has no address"):
            bar_address(resource, bar)


def test_bits_are_numbered_over_both_words() -> None:
    assert bits({0: 0x80000001, 1: 0x3}.__getitem__) == {0, 31, 32, 33}


def test_od_s_output() -> None:
    assert parse_bytes(" f4 1a 45\n 10\n") == b"\xf4\x1a\x45\x10"
