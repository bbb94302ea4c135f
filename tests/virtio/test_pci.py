# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from hostzero.virtio.pci import Group, Registers, capabilities, register_groups


def space(*caps: tuple[int, bytes]) -> bytearray:
    """A configuration space with capabilities at given offsets, linked in that order."""
    config = bytearray(256)
    config[0x34] = caps[0][0] if caps else 0
    for n, (at, cap) in enumerate(caps):
        config[at : at + len(cap)] = cap
        config[at + 1] = caps[n + 1][0] if n + 1 < len(caps) else 0
    return config


def virtio(kind: int, bar: int, offset: int, length: int, multiplier: int | None = None) -> bytes:
    body = bytes([0x09, 0, 16 if multiplier is None else 20, kind, bar, 0, 0, 0])
    body += offset.to_bytes(4, "little") + length.to_bytes(4, "little")
    return body + (b"" if multiplier is None else multiplier.to_bytes(4, "little"))


def test_each_group_is_found_where_its_capability_says() -> None:
    config = space(
        (0x40, virtio(1, 4, 0, 56)),
        (0x50, b"\x11\0\5\0" + bytes(8)),
        (0x60, virtio(2, 4, 0x3000, 64, 4)),
        (0x80, virtio(3, 4, 0x1000, 1)),
        (0x90, virtio(4, 2, 0x2000, 16)),
    )
    assert list(capabilities(bytes(config))) == [(9, 0x40), (17, 0x50), (9, 0x60), (9, 0x80), (9, 0x90)]
    assert register_groups(bytes(config)) == {
        Group.COMMON: Registers(4, 0, 56, 0),
        Group.NOTIFY: Registers(4, 0x3000, 64, 4),
        Group.ISR: Registers(4, 0x1000, 1, 0),
        Group.DEVICE: Registers(2, 0x2000, 16, 0),
    }


def test_the_first_of_a_kind_counts_and_reserved_bars_and_kinds_do_not() -> None:
    config = space(
        (0x40, virtio(1, 6, 0, 56)),
        (0x50, virtio(1, 1, 8, 56)),
        (0x60, virtio(1, 2, 0, 56)),
        (0x70, virtio(9, 0, 0, 4)),
    )
    assert register_groups(bytes(config)) == {Group.COMMON: Registers(1, 8, 56, 0)}


def test_a_list_without_an_end_ends() -> None:
    config = space((0x40, virtio(1, 4, 0, 56)))
    config[0x41] = 0x40
    assert len(list(capabilities(bytes(config)))) == 64
    assert register_groups(bytes(config)) == {Group.COMMON: Registers(4, 0, 56, 0)}


def test_a_list_that_runs_off_the_space_ends() -> None:
    config = space((0xFC, b"\x09\0\x10\1"))
    assert register_groups(bytes(config)) == {}
    assert register_groups(bytes(space())) == {}
