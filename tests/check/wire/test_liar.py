# SPDX-License-Identifier: GPL-2.0-only
"""The liar withholds and embroiders, and never promises what is not so."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from hostzero.check.wire.liar import WAYS, Liar
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.driver import State, VirtioBalloon
from hostzero.mm import MemoryManager
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO
from hostzero.mm.verify import verify_memory
from hostzero.ram import GuestMemory, open_ram
from hostzero.virtio import Feature, Transport

BOTH = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
PAGE = 4096


@dataclass
class Guest:
    """A guest of 4 MiB full of dirt whose device lies."""

    mm: MemoryManager
    liar: Liar
    driver: VirtioBalloon

    def known_zero(self) -> int:
        """Balloon in and out, a report, and the bytes that need no zeroing then."""
        self.liar.set_target(40)
        self.liar.set_target(0)
        self.mm.page_reporting.order = 4
        self.mm.page_reporting.flush(1000)
        before = self.mm.vm_stats().known_zero_bytes
        for order in (0, 0, 4, 5):
            pfn = self.mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, order)
            block = self.mm.ram_bytes[pfn * PAGE : (pfn + (1 << order)) * PAGE]
            assert not block.any()
            block[:] = 0xA5
            self.mm.free_pages(pfn, order)
        return self.mm.vm_stats().known_zero_bytes - before


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    features = DeviceConfig().features & ~getattr(request, "param", Feature(0))
    with open_ram(4 << 20) as ram:
        ram.array(np.uint8)[:] = 0xA5
        memory = GuestMemory.whole(ram)
        mm = MemoryManager(ram)
        liar = Liar(BalloonDevice(memory, DeviceConfig(features=features)), memory)
        assert isinstance(liar, Transport)
        driver = VirtioBalloon(mm, memory, liar)
        driver.probe()
        yield Guest(mm, liar, driver)


def test_without_lies_it_is_the_device(guest: Guest) -> None:
    assert guest.known_zero() > 0
    assert guest.liar.told == 0
    assert guest.liar.metrics is guest.liar.device.metrics


@pytest.mark.parametrize("way", range(1, WAYS))
def test_no_way_to_lie_makes_a_false_promise(guest: Guest, way: int) -> None:
    guest.liar.lies = [way] * 500
    guest.known_zero()
    verify_memory(guest.mm.mem)
    assert guest.liar.told > 0
    assert guest.driver.state is State.ACTIVE


def test_withheld_hints_cost_the_optimisation(guest: Guest) -> None:
    guest.liar.lies = [1] * 500
    assert guest.known_zero() == 0


@pytest.mark.parametrize("guest", [BOTH], indirect=True)
def test_without_the_bits_even_the_exact_length_is_said_of_dirt(guest: Guest) -> None:
    """Lie 8 is the exact length; the device keeps the dirt, and nobody may believe it."""
    guest.liar.inhibit_discard("dirt")
    guest.liar.lies = [8] * 500
    assert guest.known_zero() == 0
    assert guest.liar.told > 0


def test_the_exact_length_is_never_said_of_a_block_that_was_not_dropped(guest: Guest) -> None:
    guest.liar.inhibit_discard("dirt")
    rng = random.Random(3)
    guest.liar.lies = [rng.randrange(1, WAYS) for _ in range(500)]
    assert guest.known_zero() == 0
    verify_memory(guest.mm.mem)


def test_lies_are_used_up_one_an_answer_and_end_with_a_reset(guest: Guest) -> None:
    guest.liar.lies = [2, 3]
    guest.liar.set_target(1)
    assert guest.liar.lies == [3]
    guest.liar.set_status(0)
    assert not guest.liar._seen
