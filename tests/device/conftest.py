# SPDX-License-Identifier: GPL-2.0-only
"""Guests to test with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.ram import Ram
from tests.device.guest import ALL_FEATURES, Guest, HugeMemory, WrappedMemory, ram_of


@pytest.fixture
def ram() -> Iterator[Ram]:
    """Guest RAM on anonymous memory."""
    with ram_of() as opened:
        yield opened


@pytest.fixture
def guest(ram: Ram) -> Guest:
    """A guest that accepted every feature, on pages of 4 KiB."""
    return Guest(WrappedMemory(ram))


@pytest.fixture
def huge_guest(ram: Ram) -> Guest:
    """A guest that accepted every feature, on host pages of 2 MiB."""
    return Guest(HugeMemory(ram))


@pytest.fixture
def device(ram: Ram) -> BalloonDevice:
    """A device that offers everything and that nobody has touched."""
    return BalloonDevice(WrappedMemory(ram), DeviceConfig(features=ALL_FEATURES))
