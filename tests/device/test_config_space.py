# SPDX-License-Identifier: GPL-2.0-only
"""Reads and writes of the 16 bytes, whole and in pieces."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device.config_space import ConfigSpace
from hostzero.errors import DeviceError

U32 = st.integers(0, 0xFFFF_FFFF)


def test_fields_are_little_endian_in_the_order_of_the_specification() -> None:
    space = ConfigSpace(num_pages=1, actual=2, poison_val=4)
    assert space.read(0, 16, cmd_id=3) == struct.pack("<4I", 1, 2, 3, 4)


def test_a_write_over_everything_keeps_only_actual_and_poison_val() -> None:
    """A vhost-user front end sends all fields, and a num_pages that may be old."""
    space = ConfigSpace(num_pages=100)
    space.write(0, struct.pack("<4I", 7, 50, 0x8000_0000, 0xAAAA_AAAA), poison_writable=True)
    assert space == ConfigSpace(num_pages=100, actual=50, poison_val=0xAAAA_AAAA)


def test_poison_val_is_kept_from_a_driver_that_did_not_accept_it() -> None:
    space = ConfigSpace(poison_val=5)
    space.write(0, struct.pack("<4I", 7, 50, 0, 9), poison_writable=False)
    assert space == ConfigSpace(actual=50, poison_val=5)


@given(st.tuples(U32, U32, U32), st.integers(0, 16), st.integers(0, 16), st.binary(min_size=16, max_size=16))
def test_any_piece_changes_only_its_bytes_of_the_writable_fields(
    fields: tuple[int, int, int], one: int, other: int, data: bytes
) -> None:
    start, end = sorted((one, other))
    space = ConfigSpace(*fields)
    before = space.read(0, 16)
    space.write(start, data[start:end], poison_writable=True)
    after = space.read(0, 16)
    for offset in range(16):
        written = start <= offset < end and (4 <= offset < 8 or offset >= 12)
        assert after[offset] == (data if written else before)[offset]
    assert space.read(start, end - start) == after[start:end]


@pytest.mark.parametrize(("offset", "length"), [(16, 1), (12, 5), (-1, 4), (0, 17), (1 << 64, 4), (4, -1)])
def test_a_read_past_the_space_is_refused(offset: int, length: int) -> None:
    with pytest.raises(DeviceError, match="leaves the configuration space of 16 bytes"):
        ConfigSpace().read(offset, length)


def test_a_write_past_the_space_takes_nothing() -> None:
    space = ConfigSpace()
    with pytest.raises(DeviceError, match="a write of 16 bytes at 4"):
        space.write(4, b"\xff" * 16, poison_writable=True)
    assert space == ConfigSpace()


def test_reset_keeps_the_target() -> None:
    space = ConfigSpace(num_pages=1, actual=2, poison_val=3)
    space.reset()
    assert space == ConfigSpace(num_pages=1)
