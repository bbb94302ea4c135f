# SPDX-License-Identifier: GPL-2.0-only
"""The driver between the real memory manager and the real device, over dirty memory.

After every step all of the allocator's lists are walked and every page that claims to be zero
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.driver import State, VirtioBalloon
from hostzero.driver.guest_mm import GuestMm
from hostzero.errors import OutOfMemory
from hostzero.mm import MemoryManager, MmConfig
from hostzero.mm.buddy import PAGE_REPORTING_IDLE
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.page_flags import PGTY_buddy
from hostzero.mm.verify import verify_memory
from hostzero.ram import BACKINGS, GuestMemory, Ram, open_ram
from hostzero.units import PAGE_SIZE, Pfn
from hostzero.virtio import Feature, QueueRole, StatTag
from tests.driver.fakes import DIRT

# Walking all pages and reading all claims takes minutes with the compiler off.
pytestmark = pytest.mark.compiled_only

SIZE = 128 << 20
"""Enough for reporting to leave a full batch of 32 huge blocks above the watermark."""

PAGES = SIZE // PAGE_SIZE

EVERYTHING = DeviceConfig().features | Feature.PAGE_POISON
NO_OOM = EVERYTHING & ~Feature.DEFLATE_ON_OOM


@dataclass
class Machine:
    """A guest and its host in one process."""

    mm: MemoryManager
    device: BalloonDevice
    driver: VirtioBalloon

    def verify(self) -> None:
        verify_memory(self.mm.mem)

    def free_pages(self) -> int:
        return self.mm.vm_stats().free_pages

    def check_remove(self, free_before: int) -> None:
        self.driver.remove()
        self.verify()
        stats = self.mm.vm_stats()
        assert stats.free_pages == free_before
        assert stats.balloon_pages == stats.bad_pages == 0

    def zeroed_by_guest(self, order: int) -> int:
        """Allocate one zeroed block, see that it is zero, and return the bytes the guest cleared."""
        before = self.mm.vm_stats().zeroed_bytes
        pfn = self.mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, order)
        block = self.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
        assert not block.any()
        cleared = self.mm.vm_stats().zeroed_bytes - before
        block[:] = DIRT
        self.mm.free_pages(pfn, order)
        return cleared


MakeMachine = Callable[..., Machine]


@pytest.fixture
def make_machine() -> Iterator[MakeMachine]:
    """Return a factory; the guest's memory is dirty at boot."""
    rams = []

    def make(
        config: DeviceConfig | None = None,
        mm: MmConfig | None = None,
        backing: str = "anonymous",
        probe: bool = True,
    ) -> Machine:
        ram = open_ram(SIZE, backing)
        rams.append(ram)
        ram.array(np.dtype(np.uint8))[:] = DIRT
        machine = _machine(ram, config, mm)
        if probe:
            machine.driver.probe()
            machine.verify()
        return machine

    yield make
    for ram in rams:
        ram.close()


def _machine(ram: Ram, config: DeviceConfig | None, mm: MmConfig | None) -> Machine:
    memory = GuestMemory.whole(ram)
    manager = MemoryManager(ram, mm)
    device = BalloonDevice(memory, config)
    return Machine(manager, device, VirtioBalloon(manager, memory, device))


def test_the_memory_manager_is_what_the_protocol_says(make_machine: MakeMachine) -> None:
    """The assignment is checked by the type checker, the call by this test."""
    mm: GuestMm = make_machine(probe=False).mm
    assert mm.nr_pages == PAGES


def test_reported_blocks_are_allocated_without_clearing(make_machine: MakeMachine) -> None:
    """The point of bit 6: after a report the host's zeros are the guest's."""
    machine = make_machine()
    assert machine.zeroed_by_guest(9) == 512 * PAGE_SIZE
    reported = machine.mm.page_reporting.flush(1 << 20)
    machine.verify()
    assert reported > 0
    assert machine.mm.page_reporting.failed_calls == 0
    assert machine.zeroed_by_guest(9) == 0
    assert machine.device.metrics.proven_zero_bytes >= reported * 512 * PAGE_SIZE


def test_reporting_by_the_clock(make_machine: MakeMachine) -> None:
    """Two seconds after the registration the first pass runs."""
    machine = make_machine()
    machine.mm.clock.advance(1.9)
    assert machine.mm.page_reporting.report_calls == 0
    machine.mm.clock.advance(30)
    assert machine.mm.page_reporting.report_calls > 0
    assert machine.mm.page_reporting.state == PAGE_REPORTING_IDLE
    machine.verify()


@pytest.mark.parametrize(
    "config",
    [
        DeviceConfig(features=DeviceConfig().features & ~Feature.DEVICE_INIT_REPORTED),
        DeviceConfig(queue_sizes={QueueRole.REPORTING: 1}),
        DeviceConfig(queue_sizes={QueueRole.REPORTING: 4}),
    ],
    ids=["without bit 6", "ring of 1", "ring of 4"],
)
def test_reporting_without_the_bit_and_with_small_rings(
    make_machine: MakeMachine, config: DeviceConfig
) -> None:
    machine = make_machine(config)
    assert machine.mm.page_reporting.flush(1 << 20) > 0
    machine.verify()
    assert machine.mm.page_reporting.failed_calls == 0
    trusted = Feature.DEVICE_INIT_REPORTED in config.features
    assert machine.zeroed_by_guest(9) == (0 if trusted else 512 * PAGE_SIZE)


@pytest.mark.parametrize("mm", [MmConfig(page_poisoning=True), MmConfig(confidential=True)], ids=str)
def test_guests_that_take_no_word_for_zero(make_machine: MakeMachine, mm: MmConfig) -> None:
    machine = make_machine(DeviceConfig(features=EVERYTHING), mm)
    assert not machine.driver.features & (Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE)
    machine.mm.page_reporting.flush(1 << 20)
    machine.device.set_target(1000)
    machine.verify()
    machine.device.set_target(0)
    machine.verify()
    assert machine.zeroed_by_guest(9) == 512 * PAGE_SIZE
    assert machine.mm.vm_stats().known_zero_bytes == 0


def test_init_on_free_tells_a_poison_value_of_zero_and_keeps_the_bits(make_machine: MakeMachine) -> None:
    machine = make_machine(DeviceConfig(features=EVERYTHING), MmConfig(init_on_free=True))
    assert Feature.PAGE_POISON | Feature.DEVICE_INIT_REPORTED in machine.driver.features
    machine.mm.page_reporting.flush(1 << 20)
    machine.verify()


def test_deflated_pages_are_known_to_be_zero(make_machine: MakeMachine) -> None:
    """The point of bit 7, page by page: nothing is cleared again for the next owner."""
    machine = make_machine()
    machine.device.set_target(2000)
    machine.verify()
    machine.device.set_target(0)
    machine.verify()
    assert machine.device.actual == 0
    assert machine.zeroed_by_guest(0) == 0


@pytest.mark.parametrize("features", [EVERYTHING, NO_OOM], ids=["oom", "no oom"])
def test_nothing_is_left_after_remove(make_machine: MakeMachine, features: Feature) -> None:
    """Free pages before probe and after remove are the same, with everything used in between."""
    machine = make_machine(DeviceConfig(features=features), probe=False)
    free, managed = machine.free_pages(), machine.mm.vm_stats().total_pages
    for _ in range(2):
        machine.driver.probe()
        machine.device.set_target(3000)
        machine.mm.page_reporting.flush(1 << 20)
        machine.device.hint_start()
        machine.verify()
        assert machine.driver.num_free_page_blocks > 0
        machine.check_remove(free)
        assert machine.mm.vm_stats().total_pages == managed


def test_a_target_of_all_memory_and_back(make_machine: MakeMachine) -> None:
    """The balloon takes what the watermarks leave, tries again in vain, and gives all of it back."""
    machine = make_machine()
    free = machine.free_pages()
    machine.device.set_target(PAGES)
    machine.verify()
    assert machine.device.actual == machine.driver.num_pages > free * 9 // 10
    machine.mm.clock.advance(2)
    machine.device.set_target(0)
    machine.verify()
    assert machine.free_pages() == free


def test_out_of_memory_deflates(make_machine: MakeMachine) -> None:
    """A guest that needs its pages gets them from the balloon, 256 at a time."""
    machine = make_machine()
    machine.device.set_target(PAGES)
    held = [machine.mm.alloc_pages(GFP_KERNEL) for _ in range(1000)]
    assert machine.device.actual == machine.driver.num_pages < PAGES
    machine.verify()
    for pfn in held:
        machine.mm.free_pages(pfn)
    machine.verify()


def test_a_probe_without_memory_says_so_to_the_device(make_machine: MakeMachine) -> None:
    """The bits that are set stay set (virtio 1.3, 2.1.1): the error is the lack of memory and no other."""
    machine = make_machine()
    machine.driver.remove()
    held = machine.mm.alloc_pages_bulk(GFP_KERNEL, machine.mm.nr_pages)
    with pytest.raises(OutOfMemory):
        machine.mm.alloc_pages(GFP_KERNEL)
    with pytest.raises(OutOfMemory):
        machine.driver.probe()
    assert machine.device.status() & 0x83 == 0x83
    for pfn in held:
        machine.mm.free_pages(pfn)
    machine.driver.probe()
    assert machine.driver.state is State.ACTIVE


def test_without_deflate_on_oom_memory_runs_out(make_machine: MakeMachine) -> None:
    features = DeviceConfig().features & ~(Feature.DEFLATE_ON_OOM | Feature.FREE_PAGE_HINT)
    machine = make_machine(DeviceConfig(features=features))
    machine.device.set_target(PAGES)
    target = machine.driver.num_pages
    with pytest.raises(OutOfMemory):
        [machine.mm.alloc_pages(GFP_KERNEL) for _ in range(PAGES)]
    assert machine.driver.num_pages == target


def test_statistics_arrive(make_machine: MakeMachine) -> None:
    machine = make_machine()
    free = machine.free_pages()
    assert machine.device.request_stats()
    stats = machine.device.stats
    assert stats[StatTag.MEMFREE] == free * PAGE_SIZE
    assert stats[StatTag.MEMTOT] <= SIZE
    machine.device.set_target(100)
    assert machine.device.request_stats()
    assert machine.device.stats[StatTag.MEMFREE] == (free - 100) * PAGE_SIZE


def test_hinting_runs_pauses_and_ends(make_machine: MakeMachine) -> None:
    machine = make_machine()
    free = machine.free_pages()
    machine.device.hint_start()
    blocks = machine.driver.num_free_page_blocks
    assert blocks > 5
    machine.device.hint_stop()
    assert machine.driver.num_free_page_blocks == blocks
    machine.device.hint_done()
    machine.verify()
    assert machine.free_pages() == free
    assert machine.mm.vm_stats().known_zero_bytes == 0


def test_a_guest_short_of_memory_takes_hinted_blocks_back(make_machine: MakeMachine) -> None:
    machine = make_machine()
    machine.device.hint_start()
    held = []
    before = machine.driver.num_free_page_blocks
    while machine.driver.num_free_page_blocks == before:
        held.append(machine.mm.alloc_pages(GFP_KERNEL))
        assert len(held) < PAGES
    assert machine.driver.num_free_page_blocks == 0
    machine.verify()


def test_a_host_that_must_not_discard_claims_nothing(make_machine: MakeMachine) -> None:
    machine = make_machine()
    machine.device.inhibit_discard("VFIO")
    machine.mm.page_reporting.flush(1 << 20)
    machine.device.set_target(500)
    machine.device.set_target(0)
    machine.verify()
    assert machine.zeroed_by_guest(9) == 512 * PAGE_SIZE
    assert machine.device.metrics.proven_zero_bytes == 0


def test_hibernation(make_machine: MakeMachine) -> None:
    """What free pages hold is lost with the image; no claim of before survives."""
    machine = make_machine(DeviceConfig(features=EVERYTHING), MmConfig(init_on_free=False))
    machine.mm.page_reporting.flush(1 << 20)
    machine.device.set_target(500)
    machine.driver.freeze()
    machine.verify()
    machine.device.set_target(300)
    # As after the boot of the kernel that loads the image: free memory holds its leftovers.
    free_blocks = large_free_blocks(machine)
    assert len(free_blocks) > 3
    for pfn, order in free_blocks:
        machine.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE] = DIRT
    machine.driver.restore(hibernated=True)
    machine.verify()
    assert machine.driver.num_pages == 300
    machine.device.set_target(0)
    machine.verify()


def large_free_blocks(machine: Machine) -> list[tuple[int, int]]:
    """Every block of order 9 and 10 on a free list, found by its type and order."""
    mem_map = machine.mm.mem.mem_map
    heads = np.flatnonzero((mem_map["page_type"][:PAGES] == PGTY_buddy) & (mem_map["private"][:PAGES] >= 9))
    return [(int(pfn), int(mem_map[pfn]["private"])) for pfn in heads]


def test_suspend_keeps_reporting(make_machine: MakeMachine) -> None:
    machine = make_machine()
    machine.driver.freeze()
    machine.mm.clock.advance(10)
    assert machine.mm.page_reporting.failed_calls > 0, "refused, not lost"
    machine.verify()
    machine.driver.restore()
    assert machine.mm.page_reporting.flush(1 << 20) > 0
    machine.verify()
    assert machine.zeroed_by_guest(9) == 0


@pytest.mark.parametrize("backing", [name for name in BACKINGS if name in {"anonymous", "memfd"}])
def test_both_ordinary_backings(make_machine: MakeMachine, backing: str) -> None:
    machine = make_machine(backing=backing)
    machine.mm.page_reporting.flush(1 << 20)
    machine.device.set_target(700)
    machine.device.set_target(100)
    machine.verify()
    assert machine.zeroed_by_guest(9) == 0


OPERATIONS = st.one_of(
    st.tuples(st.just("target"), st.integers(0, PAGES // 2)),
    st.tuples(st.just("flush"), st.integers(1, 40)),
    st.tuples(st.just("advance"), st.sampled_from([0.1, 2.0, 5.0])),
    st.tuples(st.just("allocate"), st.integers(0, 10)),
    st.tuples(st.just("free"), st.integers(0, 1000)),
    st.tuples(st.just("hint"), st.sampled_from(["start", "stop", "done"])),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("stats"), st.none()),
    st.tuples(st.just("rebind"), st.none()),
    st.tuples(st.just("inhibit"), st.booleans()),
)


@given(
    operations=st.lists(OPERATIONS, max_size=14), features=st.sampled_from([EVERYTHING, Feature.REPORTING])
)
@settings(max_examples=max(1, settings().max_examples // 4))
def test_any_sequence_keeps_every_claim_true(operations: list[tuple[str, object]], features: Feature) -> None:
    """Owners write into every page that they get; at the end every page is back."""
    with open_ram(SIZE // 2) as ram:
        ram.array(np.dtype(np.uint8))[:] = DIRT
        config = DeviceConfig(features=features, queue_sizes={QueueRole.REPORTING: 8})
        machine = _machine(ram, config, None)
        free = machine.free_pages()
        machine.driver.probe()
        held: list[tuple[Pfn, int]] = []
        inhibited = 0
        for name, value in operations:
            if name == "inhibit":
                inhibited = _inhibit(machine, bool(value), inhibited)
            else:
                _operate(machine, name, value, held)
            assert machine.driver.state is State.ACTIVE
            assert machine.device.actual == machine.driver.num_pages == machine.mm.balloon.count
            machine.verify()
        for pfn, order in held:
            machine.mm.free_pages(pfn, order)
        machine.check_remove(free)


def _operate(machine: Machine, name: str, value: object, held: list[tuple[Pfn, int]]) -> None:
    match name, value:
        case "target", int(pages):
            machine.device.set_target(pages)
        case "flush", int(budget):
            machine.mm.page_reporting.flush(budget)
        case "advance", float(seconds):
            machine.mm.clock.advance(seconds)
        case "allocate", int(order):
            try:
                pfn = machine.mm.alloc_pages(GFP_KERNEL | GFP_ZERO, order)
            except OutOfMemory:
                return
            block = machine.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
            assert not block.any()
            block[:] = DIRT
            held.append((pfn, order))
        case "free", int(which) if held:
            pfn_held, order = held.pop(which % len(held))
            machine.mm.free_pages(pfn_held, order)
        case "hint", str(what) if Feature.FREE_PAGE_HINT in machine.driver.features:
            getattr(machine.device, f"hint_{what}")()
        case "suspend", bool(hibernated):
            machine.driver.freeze()
            machine.driver.restore(hibernated=hibernated)
        case "rebind", None:
            machine.driver.remove()
            machine.driver.probe()
        case "stats", None:
            machine.device.request_stats()


def _inhibit(machine: Machine, more: bool, inhibited: int) -> int:
    if more:
        machine.device.inhibit_discard("test")
        return inhibited + 1
    if inhibited:
        machine.device.allow_discard("test")
        return inhibited - 1
    return 0
