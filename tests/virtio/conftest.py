# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory for rings, with a hole in it and a last byte to run past."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.ram import GuestMemory, Ram, open_ram
from tests.virtio.memory import split_memory


@pytest.fixture
def ram() -> Iterator[Ram]:
    with open_ram(2 << 20) as opened:
        yield opened


@pytest.fixture
def memory(ram: Ram) -> GuestMemory:
    return split_memory(ram)
