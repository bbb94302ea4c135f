# SPDX-License-Identifier: GPL-2.0-only
"""Things that happen to a guest, to be run under every configuration by `test_matrix`.

A scenario is a function of a fresh `Machine`, registered with `@scenario`. It calls `check` after
each step. A module that adds a way for pages to change hands registers one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from hostzero import Machine
from hostzero.device import DeviceConfig
from hostzero.device.config import DEFAULT_FEATURES
from hostzero.errors import OutOfMemory
from hostzero.mm import MmConfig
from hostzero.mm.buddy import FPI_TRYLOCK, FPI_ZEROED
from hostzero.mm.contig import alloc_contig_frozen_pages, free_contig_frozen_range
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmap import MADV_NOHUGEPAGE, MADV_POPULATE_WRITE
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PG_private
from hostzero.mm.page_free import __free_frozen_pages as _free_frozen_pages
from hostzero.mm.pcplist import pindex_to_order
from hostzero.units import PAGE_SIZE, Pfn
from hostzero.virtio.features import Feature, QueueRole
from tests.mm.guest import free_lists, is_marked_zero, pcp_lists, verify, walk

MIB = 1 << 20
SIZE = 24 * MIB
DIRT = 0x5A
INIT_BITS = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE

Scenario = Callable[[Machine], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Have `test_matrix` run a function under every configuration."""
    assert function.__name__ not in SCENARIOS
    SCENARIOS[function.__name__] = function
    return function


def machine_of(config: MmConfig) -> Machine:
    """Return a machine that reports early: batches of two huge pages fit into a guest of 24 MiB."""
    device = DeviceConfig(
        features=DEFAULT_FEATURES | Feature.PAGE_POISON, queue_sizes={QueueRole.REPORTING: 2}
    )
    return Machine(SIZE, mm=config, device=device)


def bytes_of(machine: Machine, pfn: int, order: int = 0) -> NDArray[np.uint8]:
    """Return a writable view of a block."""
    view: NDArray[np.uint8] = machine.mm.ram_bytes[pfn * PAGE_SIZE : (pfn + (1 << order)) * PAGE_SIZE]
    return view


def ownerless(machine: Machine) -> Iterator[tuple[int, int]]:
    """Yield every block without an owner and its order: free, parked, deferred."""
    mem = machine.mm.mem
    for (_, order, _), blocks in free_lists(mem).items():
        yield from ((pfn, order) for pfn in blocks)
    for zone in range(len(mem.zone)):
        for (_, pindex), blocks in pcp_lists(mem, zone).items():
            yield from ((pfn, int(pindex_to_order(pindex))) for pfn in blocks)
        for pfn in walk(mem, int(mem.vm[0].trylock_heads) + zone):
            yield pfn, int(mem.mem_map[pfn].private)


def check(machine: Machine) -> None:
    """Check every list and claim, and what free pages must hold in this guest."""
    verify(machine.mm)
    stats, config = machine.mm.vm_stats(), machine.mm.config
    assert (stats.bad_pages, stats.poison_errors) == (0, 0)
    promised = 0xAA if config.page_poisoning else 0 if config.want_init_on_free else None
    if promised is not None:
        for pfn, order in ownerless(machine):
            assert (bytes_of(machine, pfn, order) == promised).all(), hex(pfn)


def believes(machine: Machine) -> bool:
    """Return whether a claim of the host spares this guest work."""
    config = machine.mm.config
    return INIT_BITS in machine.driver.features and not config.want_init_on_free


def dirty_and_free(machine: Machine, size: int = 16 * MIB) -> None:
    """Have a process write that much and end."""
    with machine.spawn() as process:
        process.fill(process.mmap(size), size, DIRT)
    check(machine)


def take_zeroed(machine: Machine, order: int, count: int) -> NDArray[np.int64]:
    """Allocate zeroed blocks, see that they are, write to them, and return them."""
    pfns = machine.mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO | GFP_COMP, count, order=order)
    assert len(pfns) > 0
    for pfn in pfns.tolist():
        assert not bytes_of(machine, pfn, order).any(), hex(pfn)
        assert not is_marked_zero(machine.mm.mem, pfn)
        bytes_of(machine, pfn, order)[:] = DIRT
    return pfns


def take_and_free_all_orders(machine: Machine) -> int:
    """Take zeroed blocks of three sizes and free them; return the bytes that were known to be zero."""
    before = machine.stats().known_zero
    taken = [(order, take_zeroed(machine, order, count)) for order, count in ((9, 3), (3, 40), (0, 300))]
    check(machine)
    for order, pfns in taken:
        machine.mm.free_pages_bulk(pfns, order)
    check(machine)
    return machine.stats().known_zero - before


@scenario
def reported_then_allocated(machine: Machine) -> None:
    """Dirty, free, report, allocate; twice, because the second round finds marks and leftovers."""
    for _ in range(2):
        dirty_and_free(machine)
        assert machine.flush() > 0
        check(machine)
        assert (take_and_free_all_orders(machine) > 0) == believes(machine)
        machine.clock.advance(10)
        check(machine)


@scenario
def through_the_balloon(machine: Machine) -> None:
    """Inflate and deflate in steps."""
    dirty_and_free(machine)
    for target in (4 * MIB, 14 * MIB, 3 * MIB, 9 * MIB, 0):
        assert machine.balloon(target) == target
        check(machine)
    assert (take_and_free_all_orders(machine) > 0) == believes(machine)


@scenario
def split_and_merged(machine: Machine) -> None:
    """A zero block is cut into pages; one of them is written; they merge again in any order."""
    mm = machine.mm
    for order in (4, 9, 10):
        pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, order)
        assert not bytes_of(machine, pfn, order).any()
        assert mm.folio_put_zeroed(pfn)
        check(machine)
        singles = take_zeroed(machine, 0, 200)
        check(machine)
        # Some pages are zero again, and freed as such between others that are not.
        for index, page in enumerate(singles[np.argsort(singles % 7, kind="stable")].tolist()):
            if index % 2:
                bytes_of(machine, page)[:] = 0
                mm.put_page_zeroed(Pfn(page))
            else:
                mm.free_pages(Pfn(page))
        check(machine)
        mm.drain_all_pages()
        check(machine)


@scenario
def populated_with_huge_pages(machine: Machine) -> None:
    """The cover letter's program, with what it leaves out: the memory is read."""
    _populate(machine, huge=True)


@scenario
def populated_with_small_pages(machine: Machine) -> None:
    """The same with 4 KiB pages."""
    _populate(machine, huge=False)


def _populate(machine: Machine, *, huge: bool) -> None:
    dirty_and_free(machine)
    machine.flush()
    before = machine.stats().known_zero
    for _ in range(2):
        with machine.spawn() as process:
            address = process.mmap(6 * MIB)
            if not huge:
                process.madvise(address, 6 * MIB, MADV_NOHUGEPAGE)
            process.madvise(address, 6 * MIB, MADV_POPULATE_WRITE)
            assert process.find_nonzero(address, 6 * MIB) is None
            check(machine)
            process.fill(address, 6 * MIB, DIRT)
            process.munmap(address + 1 * MIB, 3 * MIB)
            check(machine)
        check(machine)
    assert (machine.stats().known_zero > before) == believes(machine)


@scenario
def frozen_and_restored(machine: Machine) -> None:
    """Suspend to RAM: what was known stays known."""
    dirty_and_free(machine)
    machine.flush()
    machine.balloon(4 * MIB)
    machine.driver.freeze()
    check(machine)
    machine.clock.advance(5)
    check(machine)
    machine.driver.restore()
    check(machine)
    machine.balloon(0)
    check(machine)
    assert (take_and_free_all_orders(machine) > 0) == believes(machine)


@scenario
def hibernated(machine: Machine) -> None:
    """The image holds no free page: whatever a mark said, the bytes are another kernel's now."""
    dirty_and_free(machine)
    machine.flush()
    machine.balloon(4 * MIB)
    waiting = machine.mm.alloc_pages(GFP_KERNEL | GFP_ZERO, 5)
    machine.mm.mem.mem_map[waiting]._refcount = 0
    with machine.mm.zone_lock():
        _free_frozen_pages(machine.mm.mem, waiting, 5, FPI_TRYLOCK | FPI_ZEROED, 0)
    machine.driver.freeze()
    # Emptying the balloon freed pages of order 0 only: the block still waits.
    assert int(machine.mm.mem.zone.nr_trylock_free.sum()) == 32
    check(machine)
    for pfn, order in list(ownerless(machine)):
        bytes_of(machine, pfn, order)[:] = 0xC3
    before = machine.stats().known_zero
    machine.driver.restore(hibernated=True)
    check(machine)
    assert machine.stats().known_zero == before
    machine.balloon(0)
    check(machine)
    take_and_free_all_orders(machine)


@scenario
def contiguous_runs(machine: Machine) -> None:
    """Reported blocks are taken as one run, as a folio or as single pages: their marks end there."""
    dirty_and_free(machine)
    machine.flush()
    for order, compound in ((9, GFP_COMP), (10, GFP_COMP), (6, 0), (10, 0)):
        for zero in (GFP_ZERO, 0):
            pfn = alloc_contig_frozen_pages(machine.mm, order, GFP_KERNEL | compound | zero)
            assert pfn != NO_PAGE
            assert not zero or not bytes_of(machine, pfn, order).any()
            assert not is_marked_zero(machine.mm.mem, pfn)
            bytes_of(machine, pfn, order)[:] = DIRT
            check(machine)
            free_contig_frozen_range(machine.mm, pfn, order)
            check(machine)
    machine.flush()
    take_and_free_all_orders(machine)


@scenario
def freed_from_inside_the_allocator(machine: Machine) -> None:
    """Frees that may not wait: deferred beside zero blocks and drained by a zero free."""
    mm = machine.mm
    blocks = [mm.alloc_pages(GFP_KERNEL, 6) for _ in range(4)]
    zero = mm.alloc_pages(GFP_KERNEL | GFP_ZERO | GFP_COMP, 6)
    for pfn in blocks:
        bytes_of(machine, pfn, 6)[:] = DIRT
    with mm.zone_lock(cpu=0):
        for pfn in blocks:
            mm.free_pages_nolock(pfn, 6)
        check(machine)
    assert mm.put_page_zeroed(zero)
    assert int(mm.mem.zone.nr_trylock_free.sum()) == 0
    check(machine)
    take_and_free_all_orders(machine)


@scenario
def a_filesystems_private_flag(machine: Machine) -> None:
    """PG_private left on a page by its owner: a bad page where pages are checked, never a claim."""
    mm, config = machine.mm, machine.mm.config
    checked = config.debug_vm or config.page_poisoning or config.init_on_alloc or config.init_on_free
    for order in (0, 5):
        pfn = mm.alloc_pages(GFP_KERNEL, order)
        bytes_of(machine, pfn, order)[:] = DIRT
        for page in range(pfn, pfn + (1 << order)):
            mm.mem.mem_map[page].flags_f |= PG_private
        if checked:
            mm.mem.mem_map.flags_f[pfn : pfn + (1 << order)] &= ~PG_private
        mm.free_pages(pfn, order)
        check(machine)
    take_and_free_all_orders(machine)


@scenario
def out_of_memory(machine: Machine) -> None:
    """A guest that needs its pages has the balloon give them back, known zeros and all."""
    dirty_and_free(machine)
    machine.balloon(12 * MIB)
    before, held = machine.driver.num_pages, list[Pfn]()
    while machine.driver.num_pages > before - 1024:
        held.append(machine.mm.alloc_pages(GFP_KERNEL | GFP_ZERO))
        assert not bytes_of(machine, held[-1]).any()
        bytes_of(machine, held[-1])[:] = DIRT
    check(machine)
    try:
        while True:
            held.append(machine.mm.alloc_pages(GFP_KERNEL | GFP_ZERO))
            assert not bytes_of(machine, held[-1]).any()
    except OutOfMemory:
        assert machine.driver.num_pages == 0
    check(machine)
    machine.mm.free_pages_bulk(np.array(held, dtype=np.int64))
    check(machine)


@scenario
def unbound_and_bound_again(machine: Machine) -> None:
    """Claims outlive the device that made them."""
    dirty_and_free(machine)
    machine.flush()
    machine.balloon(4 * MIB)
    believed = believes(machine)
    machine.driver.remove()
    check(machine)
    assert (take_and_free_all_orders(machine) > 0) == believed
    machine.driver.probe()
    check(machine)
    assert machine.flush() > 0
    check(machine)
