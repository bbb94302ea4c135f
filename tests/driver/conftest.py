# SPDX-License-Identifier: GPL-2.0-only
"""A guest of 16 MiB with dirty memory, a device, and a driver that is bound to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hostzero.driver import State, VirtioBalloon
from hostzero.ram import GuestMemory, Ram, open_ram
from tests.driver.fakes import FakeConfig, FakeDevice, FakeMm


@dataclass
class Guest:
    """One guest with its device and its driver."""

    ram: Ram
    memory: GuestMemory
    mm: FakeMm
    device: FakeDevice
    driver: VirtioBalloon

    def check_nothing_left(self, free_before: int) -> None:
        """Remove the driver and see that every page is back and nothing is registered."""
        if self.driver.state is not State.UNBOUND:
            self.driver.remove()
        assert self.mm.nr_free == free_before
        assert self.mm.balloon.count == 0
        assert self.mm.managed == self.mm.nr_pages
        assert self.mm.page_reporting.dev is None
        assert self.mm.oom_notifiers == []
        assert self.mm.balloon.migratepage is None


MakeGuest = Callable[..., Guest]


@pytest.fixture
def make_guest() -> Iterator[MakeGuest]:
    """Return a factory: `config` is the guest's, everything else goes to the device."""
    rams: list[Ram] = []

    def make(*, config: FakeConfig | None = None, probe: bool = True, **device: object) -> Guest:
        ram = open_ram(16 << 20)
        rams.append(ram)
        memory = GuestMemory.whole(ram)
        mm = FakeMm(ram, config)
        fake = FakeDevice(memory, **device)  # type: ignore[arg-type]
        guest = Guest(ram, memory, mm, fake, VirtioBalloon(mm, memory, fake))
        if probe:
            guest.driver.probe()
        return guest

    yield make
    for ram in rams:
        ram.close()
