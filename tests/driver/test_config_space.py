# SPDX-License-Identifier: GPL-2.0-only
"""The configuration space: little endian, by field, and never short."""

from __future__ import annotations

import pytest

from hostzero.driver.config_space import ConfigSpace
from hostzero.errors import DriverError
from hostzero.virtio import BalloonConfig
from tests.driver.conftest import MakeGuest


def test_fields_are_read_at_their_offsets(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False, config_cut=4)
    guest.device.config = BalloonConfig(0x01020304, 5, 0x8000_0006, 7)
    config = ConfigSpace(guest.device)
    assert config.num_pages() == 0x01020304
    assert config.free_page_hint_cmd_id() == 0x8000_0006


def test_fields_are_written_at_their_offsets(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False)
    config = ConfigSpace(guest.device)
    config.write_actual(0x0A0B0C0D)
    config.write_poison_val(0xAAAA_AAAA)
    assert guest.device.config == BalloonConfig(actual=0x0A0B0C0D, poison_val=0xAAAA_AAAA)


def test_a_short_read_is_an_error_not_a_small_number(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False, config_cut=2)
    with pytest.raises(DriverError, match="returned 2 bytes for num_pages, which has 4"):
        ConfigSpace(guest.device).num_pages()
