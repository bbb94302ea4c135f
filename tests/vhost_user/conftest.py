# SPDX-License-Identifier: GPL-2.0-only
"""A device with a guest, and a control socket in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.ram import Ram
from tests.device.guest import Guest, WrappedMemory, ram_of
from tests.vhost_user.control_service import FakeService, Loop


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
def service(guest: Guest) -> FakeService:
    """The backend of that guest."""
    return FakeService(guest.device)


@pytest.fixture
def loop(service: FakeService) -> Iterator[Loop]:
    """The loop of that backend; at the end nothing may be left in it."""
    made = Loop(service)
    yield made
    made.close()
