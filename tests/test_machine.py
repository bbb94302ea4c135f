# SPDX-License-Identifier: GPL-2.0-only
"""A whole machine: what is given away comes back as zero, known or not, whoever the guest is.

Most guests here have a reporting queue of four entries: reporting begins when a batch of huge
pages is free, and four of them are free in a guest of a few MiB.
"""

from __future__ import annotations

import dataclasses
import doctest
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero import Machine, MachineStats
from hostzero.device import DeviceConfig
from hostzero.device.config import DEFAULT_FEATURES
from hostzero.errors import DriverError, HostzeroError, NegotiationError, UsageError
from hostzero.jit import COMPILER_ON
from hostzero.mm import MmConfig, Process
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO
from hostzero.mm.mmap import MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE
from hostzero.mm.verify import verify_memory
from hostzero.ram import Ram, open_ram
from hostzero.ram.residency import private_resident
from hostzero.units import PAGE_SIZE
from hostzero.virtio import StatTag
from hostzero.virtio.features import Feature, QueueRole, names
from tests.ram.host import mapped

MIB = 1 << 20
HUGE = 2 * MIB
SIZE = 32 * MIB
DIRT = 0xAA
TABLES = 32 * PAGE_SIZE
"""More than the page tables of any process here."""

BIT6 = Feature.DEVICE_INIT_REPORTED
BIT7 = Feature.DEVICE_INIT_ON_INFLATE
OPTIONAL = (Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING, BIT6, BIT7)
SUBSETS = [
    Feature(sum(chosen))
    for length in range(len(OPTIONAL) + 1)
    for chosen in itertools.combinations(OPTIONAL, length)
    if BIT6 not in chosen or Feature.REPORTING in chosen
]
OPTIONS = Feature(sum(OPTIONAL))

GUESTS = {
    "plain": MmConfig(),
    "poisoning": MmConfig(page_poisoning=True),
    "init-on-free": MmConfig(init_on_free=True),
    "init-on-alloc": MmConfig(init_on_alloc=True),
    "init-on-both": MmConfig(init_on_alloc=True, init_on_free=True),
    "poisoning-wins": MmConfig(page_poisoning=True, init_on_alloc=True, init_on_free=True),
    "confidential": MmConfig(confidential=True),
    "confidential-poisoning": MmConfig(confidential=True, page_poisoning=True),
    "two-cpus": MmConfig(nr_cpus=2),
    "small-pages": MmConfig(thp="never"),
}
OFFERS = {
    "everything": DEFAULT_FEATURES | Feature.PAGE_POISON,
    "must-tell-host": DEFAULT_FEATURES | Feature.PAGE_POISON | Feature.MUST_TELL_HOST,
    "no-page-poison": DEFAULT_FEATURES,
    "bit-6-alone": (DEFAULT_FEATURES | Feature.PAGE_POISON) & ~BIT7,
    "bit-7-alone": (DEFAULT_FEATURES | Feature.PAGE_POISON) & ~BIT6,
    "neither-bit": (DEFAULT_FEATURES | Feature.PAGE_POISON) & ~(BIT6 | BIT7),
    "nothing": Feature.VERSION_1,
}


def small(features: Feature = DEFAULT_FEATURES) -> DeviceConfig:
    """Return a device whose batches fit into a small guest."""
    return DeviceConfig(features=features, queue_sizes={QueueRole.REPORTING: 4})


def machine_of(features: Feature = DEFAULT_FEATURES, **options: Any) -> Machine:
    """Return a machine of 32 MiB, or on the `ram` given."""
    return Machine(SIZE, device=small(features), **options)


def dirty_and_free(machine: Machine, size: int, cpu: int = 0) -> None:
    """Write `size` bytes of guest memory in a process that ends after."""
    with machine.spawn(cpu=cpu) as process:
        process.fill(process.mmap(size), size, DIRT)


def populate(machine: Machine, process: Process, size: int) -> tuple[int, int]:
    """Populate `size` bytes and see that they are zero; return what the guest zeroed, and what it knew of."""
    before = machine.stats()
    address = process.mmap(size)
    process.madvise(address, size, MADV_POPULATE_WRITE)
    after = machine.stats()
    assert process.find_nonzero(address, size) is None
    assert process.read(address + size - 8, 8) == bytes(8)
    assert process.rss >= size
    return after.guest_zeroed - before.guest_zeroed, after.known_zero - before.known_zero


def take_everything_zeroed(machine: Machine) -> int:
    """Allocate all memory as zeroed blocks, huge ones first; check every byte and return how many."""
    taken = 0
    for order in (9, 3, 0):
        pfns = machine.mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO, SIZE // PAGE_SIZE, order=order)
        for pfn in pfns.tolist():
            start, length = pfn * PAGE_SIZE, PAGE_SIZE << order
            assert not machine.mm.ram_bytes[start : start + length].any(), hex(pfn)
            taken += length
    return taken


def check(machine: Machine) -> None:
    """Walk all lists and read all claims, and see that no page was lost on the way."""
    verify_memory(machine.mm.mem)
    stats = machine.mm.vm_stats()
    assert (stats.bad_pages, stats.poison_errors) == (0, 0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Ram]:
    """Every memory that a machine opens for itself."""
    rams: list[Ram] = []

    def spy(size: int, backing: str = "anonymous") -> Ram:
        rams.append(open_ram(size, backing))
        return rams[-1]

    monkeypatch.setattr("hostzero.machine.open_ram", spy)
    return rams


# ------------------------------------------------------------------ the story


@pytest.mark.compiled_only
def test_the_example_in_the_docstring() -> None:
    assert Machine.__doc__ is not None
    example = doctest.DocTestParser().get_doctest(Machine.__doc__, {}, "Machine", None, None)
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner().run(example, out=report.append)
    assert failed == 0, "".join(report)
    assert attempted == 3


@pytest.mark.compiled_only
@pytest.mark.parametrize("known", [True, False], ids=["bit-6", "no-bit-6"])
def test_what_was_reported_is_not_zeroed_again_if_bit_6_says_so(known: bool) -> None:
    with machine_of(DEFAULT_FEATURES if known else DEFAULT_FEATURES & ~BIT6) as machine:
        dirty_and_free(machine, 24 * MIB)
        resident = machine.ram.resident()
        assert machine.flush() > 0
        stats = machine.stats()
        # Blocks are of 2 or 4 MiB, and some were never touched: more is discarded than comes back.
        assert 20 * MIB <= resident - stats.resident <= stats.host_discarded == stats.host_proven_zero
        with machine.spawn() as process:
            zeroed, known_zero = populate(machine, process, 8 * MIB)
        if known:
            assert (known_zero, zeroed < TABLES) == (8 * MIB, True)
        else:
            assert (known_zero, 0 <= zeroed - 8 * MIB < TABLES) == (0, True)
        check(machine)


@pytest.mark.compiled_only
@pytest.mark.parametrize("known", [True, False], ids=["bit-7", "no-bit-7"])
def test_what_left_the_balloon_is_not_zeroed_again_if_bit_7_says_so(known: bool) -> None:
    """Reporting is not offered, so that everything known comes from the bitmap."""
    features = DEFAULT_FEATURES & ~(Feature.REPORTING | BIT6)
    with machine_of(features if known else features & ~BIT7) as machine:
        dirty_and_free(machine, 24 * MIB)
        resident = machine.ram.resident()
        assert machine.balloon(24 * MIB) == 24 * MIB
        stats = machine.stats()
        assert (stats.balloon, stats.host_discarded) == (24 * MIB, 24 * MIB)
        assert resident - stats.resident >= 16 * MIB
        check(machine)
        assert machine.balloon(0) == 0
        check(machine)
        with machine.spawn() as process:
            zeroed, known_zero = populate(machine, process, 8 * MIB)
        if known:
            assert (known_zero, zeroed < TABLES) == (8 * MIB, True)
        else:
            assert (known_zero, 0 <= zeroed - 8 * MIB < TABLES) == (0, True)
        check(machine)


@pytest.mark.compiled_only
def test_an_inhibited_host_discards_nothing_and_nothing_is_known() -> None:
    """As during postcopy: the reason is taken back, and the same blocks can be dropped later."""
    with machine_of() as machine:
        dirty_and_free(machine, 16 * MIB)
        machine.device.inhibit_discard("postcopy")
        assert machine.flush() > 0
        assert machine.balloon(4 * MIB) == 4 * MIB
        assert machine.stats().host_discarded == 0
        assert machine.balloon(0) == 0
        with machine.spawn() as process:
            assert populate(machine, process, 8 * MIB)[1] == 0
        machine.device.allow_discard("postcopy")
        assert machine.flush() > 0
        with machine.spawn() as process:
            assert populate(machine, process, 8 * MIB)[1] > 0


@pytest.mark.compiled_only
def test_the_same_calls_give_the_same_pages() -> None:
    """Every record of every page, all of guest memory, and both sides' statistics."""

    def life(machine: Machine) -> tuple[list[int], MachineStats]:
        dirty_and_free(machine, 12 * MIB)
        pfns = [int(machine.mm.alloc_pages(GFP_HIGHUSER_MOVABLE | GFP_ZERO, order)) for order in (0, 3, 9)]
        machine.clock.advance(5)
        machine.flush()
        machine.balloon(6 * MIB)
        machine.device.request_stats()
        machine.balloon(1 * MIB)
        process = machine.spawn()
        process.write(process.mmap(5 * MIB) + 123, b"hostzero")
        # How many of its own pages the host takes for it is the host's affair.
        return pfns, dataclasses.replace(machine.stats(), resident=0)

    with machine_of() as one, machine_of() as other:
        assert life(one) == life(other)
        assert one.device.metrics == other.device.metrics
        assert one.mm.vm_stats() == other.mm.vm_stats()
        for ours, theirs in zip(one.mm.mem, other.mm.mem, strict=True):
            if ours is not one.mm.mem.vm:  # holds the address of guest memory
                assert np.array_equal(ours, theirs)


def test_page_reporting_waits_two_seconds() -> None:
    with machine_of() as machine:
        reporting = machine.mm.page_reporting
        machine.clock.advance(1.9)
        assert reporting.reported_blocks == 0
        machine.clock.advance(0.1)
        assert reporting.reported_blocks > 0


@pytest.mark.compiled_only
def test_a_later_free_is_reported_two_seconds_after_it() -> None:
    with machine_of() as machine:
        reporting = machine.mm.page_reporting
        machine.clock.advance(60)
        machine.flush()
        dirty_and_free(machine, 16 * MIB)
        done = reporting.reported_blocks
        machine.clock.advance(1.9)
        assert reporting.reported_blocks == done
        machine.clock.advance(0.1)
        assert reporting.reported_blocks > done


# ------------------------------------------------------------------ every combination


@pytest.mark.compiled_only
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: ",".join(names(subset)) or "none")
def test_every_legal_subset_of_features_works(subset: Feature, backing: str) -> None:
    with machine_of(DEFAULT_FEATURES & ~OPTIONS | subset, backing=backing) as machine:
        assert machine.driver.features & OPTIONS == subset
        assert machine.device.acked == machine.driver.features
        dirty_and_free(machine, 24 * MIB)
        check(machine)
        if Feature.FREE_PAGE_HINT in subset:
            machine.device.hint_start()  # before the report: hinted blocks come back as unknown
            assert machine.driver.num_free_page_blocks > 0
            check(machine)
            machine.device.hint_done()
            assert machine.driver.num_free_page_blocks == 0
        assert (machine.flush() > 0) == (Feature.REPORTING in subset)
        assert machine.balloon(8 * MIB) == 8 * MIB
        check(machine)
        assert machine.device.request_stats() == (Feature.STATS_VQ in subset)
        assert (StatTag.MEMFREE in machine.device.stats) == (Feature.STATS_VQ in subset)
        assert machine.balloon(0) == 0
        check(machine)
        assert take_everything_zeroed(machine) > 24 * MIB
        assert (machine.stats().known_zero > 0) == bool(subset & (BIT6 | BIT7))
        metrics = machine.device.metrics
        assert (metrics.reporting.claims > 0) == (BIT6 in subset)
        assert (metrics.inflate.claims > 0) == (BIT7 in subset)
        check(machine)


@pytest.mark.compiled_only
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("guest", GUESTS)
def test_every_kind_of_guest_gets_zeros(guest: str, offer: str) -> None:
    """Dirty at boot; then two rounds of dirtying, freeing, reporting and ballooning."""
    config = GUESTS[guest]
    with open_ram(SIZE) as ram:
        ram.array(np.uint8)[:] = DIRT
        machine = machine_of(OFFERS[offer], mm=config, ram=ram)
        check(machine)
        for size in (20 * MIB, 12 * MIB):
            dirty_and_free(machine, size, cpu=config.nr_cpus - 1)
            check(machine)
            machine.flush()
            check(machine)
            for target in (10 * MIB, 3 * MIB, 0):
                assert machine.balloon(target) == target
                check(machine)
            with machine.spawn() as process:
                populate(machine, process, 6 * MIB)
                check(machine)
        machine.flush()
        assert take_everything_zeroed(machine) > 24 * MIB
        check(machine)
        known = machine.stats().known_zero
        init_bits = machine.driver.features & (BIT6 | BIT7)
        if config.confidential or config.page_poisoning:
            assert (init_bits, known) == (Feature(0), 0)
        elif not init_bits:
            assert known == 0
        elif not config.want_init_on_free:  # which zeroes everything itself, and asks nobody
            assert known > 0


@pytest.mark.compiled_only
def test_a_confidential_guest_never_takes_the_hosts_word() -> None:
    with machine_of(mm=MmConfig(confidential=True)) as machine:
        assert not machine.driver.features & (BIT6 | BIT7)
        for _ in range(3):
            dirty_and_free(machine, 16 * MIB)
            machine.flush()
            machine.balloon(8 * MIB)
            machine.balloon(0)
            with machine.spawn() as process:
                zeroed, known = populate(machine, process, 8 * MIB)
            assert (known, zeroed >= 8 * MIB) == (0, True)
        assert machine.stats().host_proven_zero > 0
        assert machine.mm.forget_zero_claims() == 0


# ------------------------------------------------------------------ booting again


@pytest.mark.compiled_only
def test_a_reboot_keeps_the_contents_and_forgets_the_claims() -> None:
    with open_ram(SIZE) as ram:
        with machine_of(ram=ram) as machine:
            dirty_and_free(machine, 16 * MIB)
            assert machine.flush() > 0
            assert machine.mm.forget_zero_claims() > 0
            assert machine.flush() == 0
        assert not ram.closed
        # Between two lives of a guest anything may be written, also where it knew of zeros.
        ram.array(np.uint8)[:] = DIRT
        with machine_of(ram=ram) as machine:
            assert machine.ram is ram
            kept = int((ram.array(np.uint8) == DIRT).sum())
            assert kept > SIZE - MIB
            check(machine)
            with machine.spawn() as process:
                assert populate(machine, process, 8 * MIB)[1] == 0
            taken = take_everything_zeroed(machine)
            assert taken > 24 * MIB
            assert machine.stats().known_zero == 0
        assert not ram.closed


def test_memory_and_backing_are_the_rams_own() -> None:
    with open_ram(8 * MIB, "memfd") as ram, Machine("1G", backing="hugetlb", ram=ram) as machine:
        assert (machine.stats().memory, machine.ram.backing) == (8 * MIB, "memfd")


# ------------------------------------------------------------------ beginnings and ends


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory": "3M"}, UsageError),
        ({"memory": "many"}, UsageError),
        ({"memory": 0}, UsageError),
        ({"memory": "2M"}, UsageError),
        ({"memory": "8M", "backing": "paper"}, UsageError),
        ({"memory": "8M", "mm": MmConfig(nr_cpus=0)}, UsageError),
        ({"memory": "8M", "mm": MmConfig(cma_pages=7)}, UsageError),
        ({"memory": "8M", "features": BIT6}, UsageError),
        ({"memory": "8M", "features": Feature.ACCESS_PLATFORM}, UsageError),
        ({"memory": "8M", "features": Feature(0), "device": DeviceConfig()}, UsageError),
        ({"memory": "8M", "device": DeviceConfig(queue_sizes={QueueRole.INFLATE: 1})}, DriverError),
    ],
    ids=str,
)
def test_what_cannot_be_built_leaves_nothing_open(
    opened: list[Ram], options: dict[str, Any], error: type[HostzeroError]
) -> None:
    with pytest.raises(error):
        Machine(**options)
    assert all(ram.closed for ram in opened)


@pytest.mark.parametrize("failure", [NegotiationError("no"), KeyboardInterrupt()], ids=repr)
def test_a_probe_that_fails_gives_the_memory_back_at_once(
    opened: list[Ram], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """The arrays are in the traceback still, and keep the mapping."""

    def fail(_driver: object) -> None:
        opened[0].buffer[:] = bytes([DIRT]) * (8 * MIB)
        raise failure

    monkeypatch.setattr("hostzero.driver.VirtioBalloon.probe", fail)
    with pytest.raises(type(failure)) as caught:
        Machine("8M")
    (ram,) = opened
    assert (ram.closed, caught.value) == (True, failure)
    assert not mapped(ram.base) or private_resident(ram.base, ram.size) == 0


def test_a_failed_machine_leaves_a_given_memory_open() -> None:
    with open_ram(8 * MIB) as ram:
        ram.buffer[:4] = b"kept"
        with pytest.raises(UsageError):
            Machine(ram=ram, features=BIT6)
        assert not ram.closed
        assert bytes(ram.buffer[:4]) == b"kept"


def test_closing_gives_the_memory_back_at_once(opened: list[Ram]) -> None:
    """The machine's own arrays keep the mapping, but there is no memory left under it."""
    with Machine("8M") as machine:
        (ram,) = opened
        ram.buffer[:] = bytes([DIRT]) * ram.size
        assert machine.stats().resident == 8 * MIB
    assert ram.closed
    assert private_resident(ram.base, ram.size) == 0
    assert len(machine.mm.ram_bytes) == 8 * MIB


def test_closing_twice_is_harmless(opened: list[Ram]) -> None:
    machine = Machine("8M")
    machine.close()
    machine.close()
    assert not machine.device.live
    assert [ram.closed for ram in opened] == [True]


def test_an_error_inside_the_with_block_closes_the_machine(opened: list[Ram]) -> None:
    with pytest.raises(ZeroDivisionError), Machine("8M"):
        _ = 1 // 0
    assert opened[0].closed


def test_sizes_may_be_text_or_bytes() -> None:
    with Machine("8M") as text, Machine(8 * MIB) as number:
        assert text.stats().memory == number.stats().memory == 8 * MIB


def test_features_are_short_for_a_device() -> None:
    features = DEFAULT_FEATURES & ~(BIT6 | BIT7)
    with Machine("8M", features=features) as machine:
        assert machine.device.config == DeviceConfig(features=features)


# ------------------------------------------------------------------ anything, in any order

REASONS = ("postcopy", "vfio")
LARGEST = 8 * MIB
"""What the process may map: with the balloon, less than there is, so that memory never runs out."""


class WholeMachine(RuleBasedStateMachine):
    """One process on one machine, a balloon, a clock, and a host that may stop discarding.

    The shadow holds the bytes of each mapping. Every read is compared with it, and after each
    rule all lists are walked and all claims read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shadow: dict[int, bytearray] = {}
        self.reasons: list[str] = []

    @initialize(
        guest=st.sampled_from(sorted(GUESTS)),
        offer=st.sampled_from(sorted(OFFERS)),
        backing=st.sampled_from(["anonymous", "memfd"]),
    )
    def boot(self, guest: str, offer: str, backing: str) -> None:
        self.ram = open_ram(24 * MIB, backing)
        self.ram.array(np.uint8)[:] = DIRT
        self.machine = Machine(ram=self.ram, device=small(OFFERS[offer]), mm=GUESTS[guest])
        self.process = self.machine.spawn()
        self.free = self.machine.mm.vm_stats().free_pages

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for address in list(self.shadow):
            self.compare(address, 0, len(self.shadow[address]))
            self.drop(address)
        assert self.machine.balloon(0) == 0
        check(self.machine)
        # The table of the process may have gone and come; nothing else may be missing.
        assert self.machine.mm.vm_stats().free_pages == self.free
        self.process.exit()
        self.machine.close()
        self.ram.close()

    def compare(self, address: int, offset: int, length: int) -> None:
        assert self.process.read(address + offset, length) == self.shadow[address][offset : offset + length]

    def drop(self, address: int) -> None:
        self.process.munmap(address, len(self.shadow.pop(address)))

    def some_range(self, data: st.DataObject, unit: int = 1) -> tuple[int, int, int]:
        address = data.draw(st.sampled_from(sorted(self.shadow)))
        size = len(self.shadow[address])
        offset = data.draw(st.integers(0, size // unit - 1)) * unit
        length = data.draw(st.integers(1, min((size - offset) // unit, 3 * PAGE_SIZE))) * unit
        return address, offset, length

    @rule(size=st.one_of(st.integers(1, 40).map(lambda n: n * PAGE_SIZE), st.sampled_from([HUGE, 5 * MIB])))
    def mmap(self, size: int) -> None:
        if sum(map(len, self.shadow.values())) + size <= LARGEST:
            self.shadow[self.process.mmap(size)] = bytearray(size)

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def munmap(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.shadow)))
        self.compare(address, 0, len(self.shadow[address]))
        self.drop(address)

    @precondition(lambda self: self.shadow)
    @rule(data=st.data(), huge=st.booleans())
    def populate(self, data: st.DataObject, huge: bool) -> None:
        address, offset, length = self.some_range(data, PAGE_SIZE)
        self.process.madvise(address + offset, length, MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)
        self.process.madvise(address + offset, length, MADV_POPULATE_WRITE)
        self.compare(address, offset, length)

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def dontneed(self, data: st.DataObject) -> None:
        address, offset, length = self.some_range(data, PAGE_SIZE)
        self.process.madvise(address + offset, length, MADV_DONTNEED)
        self.shadow[address][offset : offset + length] = bytes(length)

    @precondition(lambda self: self.shadow)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write(self, data: st.DataObject, byte: int) -> None:
        address, offset, length = self.some_range(data)
        self.process.write(address + offset, bytes([byte]) * length)
        self.shadow[address][offset : offset + length] = bytes([byte]) * length

    @precondition(lambda self: self.shadow)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def fill(self, data: st.DataObject, byte: int) -> None:
        address = data.draw(st.sampled_from(sorted(self.shadow)))
        size = len(self.shadow[address])
        self.process.fill(address, size, byte)
        self.shadow[address][:] = bytes([byte]) * size

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self.compare(*self.some_range(data))

    @rule(budget=st.one_of(st.integers(0, 4), st.just(1 << 20)))
    def flush(self, budget: int) -> None:
        self.machine.flush(budget)

    @rule(size=st.integers(0, 2048).map(lambda pages: pages * PAGE_SIZE))
    def balloon(self, size: int) -> None:
        assert self.machine.balloon(size) == size

    @rule(seconds=st.sampled_from([0.01, 1.0, 2.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.machine.clock.advance(seconds)

    @rule()
    def request_stats(self) -> None:
        if self.machine.device.request_stats():
            assert self.machine.device.stats[StatTag.MEMTOT] > 0

    @rule(reason=st.sampled_from(REASONS))
    def inhibit(self, reason: str) -> None:
        self.machine.device.inhibit_discard(reason)
        self.reasons.append(reason)

    @precondition(lambda self: self.reasons)
    @rule()
    def allow(self) -> None:
        self.machine.device.allow_discard(self.reasons.pop())

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "machine"):
            return
        check(self.machine)
        stats = self.machine.stats()
        assert stats.host_proven_zero <= stats.host_discarded
        assert self.machine.device.inhibited == bool(self.reasons)
        assert self.machine.device.metrics.malformed == self.machine.device.metrics.broken_queues == 0


WholeMachine.TestCase.settings = settings(max_examples=50 if COMPILER_ON else 2, stateful_step_count=30)
TestWholeMachine = pytest.mark.compiled_only(WholeMachine.TestCase)
