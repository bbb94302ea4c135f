# SPDX-License-Identifier: GPL-2.0-only
"""Operations of the host and of the balloon: reports, inflation, sleep, and devices that come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero.check.host import FAULTS, LIES, Report
from hostzero.check.inventory import BALLOON
from hostzero.check.machine_ops import operation
from hostzero.check.world_setup import FEATURES
from hostzero.driver import State
from hostzero.errors import DriverError, HostzeroError, OutOfMemory
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, USER_ADDR_NONE
from hostzero.mm.migrate import isolate_migratepages_range, migrate_pages
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_alloc import alloc_from_zonelists
from hostzero.mm.page_reporting import PageReportingDevInfo
from hostzero.units import PAGE_SIZE, Pfn
from hostzero.virtio.features import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hostzero.check.world import World

CAPACITIES = (3, 1, 0, 7)
ORDERS = (3, 0, 6, 9, 2, 4, 10)
"""Smallest orders that another driver hears of: the lower, the more blocks, and the more calls for them."""
BUDGETS = (1 << 20, 1, 3)
TARGETS = (0, 1, 20, 60, 150, 1500)
MOST_MOVED = 150
"""How many pages a balloon has at most where a range for a gigantic page is emptied of them, one by one."""
SECONDS = (2.0, 0.5, 10.0)


def with_device(world: World, call: Callable[[], object]) -> None:
    """Make a call of the driver; that a device has failed, or is not there, is no news."""
    try:
        call()
    except HostzeroError:
        if world.machine.driver.failure is None and world.machine.driver.state is State.ACTIVE:
            raise


@operation(weight=3, budget=len(BUDGETS) - 1)
def flush(world: World, budget: int) -> None:
    """Free memory is reported now."""
    world.unasked = True
    with_device(world, lambda: world.machine.flush(BUDGETS[budget % len(BUDGETS)]))


@operation(weight=3, pages=len(TARGETS) - 1)
def balloon(world: World, pages: int) -> None:
    """The host wants a balloon of another size."""
    world.unasked = True
    most = MOST_MOVED if world.mm.config.gigantic_order else world.pages // 5
    world.balloon(min(TARGETS[pages % len(TARGETS)], most) * PAGE_SIZE)


@operation(seconds=len(SECONDS) - 1)
def wait(world: World, seconds: int) -> None:
    """Guest time passes, and what was put off until then is done."""
    with_device(world, lambda: world.machine.clock.advance(SECONDS[seconds % len(SECONDS)]))


@operation(weight=2, a=FAULTS, b=FAULTS, c=FAULTS)
def host_fails(world: World, a: int, b: int, c: int) -> None:
    """The host's next discards fail or do part of their work."""
    world.host.faults = [a, b, c]


@operation(weight=2, a=LIES, b=LIES, c=LIES)
def host_lies(world: World, a: int, b: int, c: int) -> None:
    """The host's next answers leave out what it could say."""
    world.host.lies = [a, b, c]


@operation()
def host_reorders(world: World) -> None:
    """The host answers the next batch in another order than it was asked."""
    world.host.reorder = True


@operation()
def host_falls_silent(world: World) -> None:
    """The host does not hear the next notification."""
    world.host.silent = 1


@operation(allow=1)
def inhibit(world: World, allow: int) -> None:
    """Discards are forbidden on the host for a while."""
    device = world.machine.device
    if device.inhibited:
        device.allow_discard("the search")
    elif not allow:
        device.inhibit_discard("the search")


@operation(isolates=True, when=lambda world: world.mm.balloon.count > 0, at=4095, count=15)
def migrate_balloon(world: World, at: int, count: int) -> None:
    """Pages are moved out of a range, among them pages of the balloon."""
    world.unasked = True
    before = world.before
    if before is None:
        return
    held = np.flatnonzero(before.pages.place == BALLOON)
    if not len(held):
        return
    start, out, heads = int(held[at % len(held)]), np.full(1, -1, dtype=np.int64), list[int]()
    for page in range(start, min(start + count % 16 + 1, world.pages)):
        if before.pages.place[page] != BALLOON:
            continue
        if int(isolate_migratepages_range(world.mem, page, page + 1, out)) == 1:
            heads.append(int(out[0]))
    gfp = GFP_HIGHUSER_MOVABLE
    # Taken beforehand: a page that was just freed would be the next one's target.
    targets = [int(alloc_from_zonelists(world.mem, gfp, 0, USER_ADDR_NONE, 0, 0)) for _ in heads]
    migrate_pages(world.mm, heads, lambda order: targets.pop())
    for pfn in targets:
        if pfn != NO_PAGE:
            world.mem.mem_map[pfn]._refcount = 1
            world.mm.free_pages(Pfn(pfn))


@operation()
def suspend(world: World) -> None:
    """The guest sleeps, and wakes with its memory."""
    driver = world.machine.driver
    if driver.state not in {State.ACTIVE, State.FAILED}:
        return
    with_device(world, driver.freeze)
    world.check("suspend: the driver has let go")
    with_device(world, driver.restore)


@operation(isolates=True)
def hibernate(world: World) -> None:
    """The guest comes back from an image: free memory holds what the loader left there."""
    driver = world.machine.driver
    if driver.state not in {State.ACTIVE, State.FAILED}:
        return
    with_device(world, driver.freeze)
    pages = world.oracle.moment().pages
    for pfn in pages.blocks():
        if 1 <= pages.place[pfn] <= 3:
            # The host still knows of what was reported: it is asked for other bytes, and for no others.
            world.host.zero[pfn : pfn + (1 << int(pages.order[pfn]))] = False
            world.bytes_of(pfn, int(pages.order[pfn]))[:] = 0xC3
    with_device(world, lambda: driver.restore(hibernated=True))


@operation()
def reset_device(world: World) -> None:
    """The driver lets go of the device and takes it again."""
    driver = world.machine.driver
    if driver.state is not State.UNBOUND:
        with_device(world, driver.remove)
        world.check("reset_device: the driver has let go")
    if driver.state is State.UNBOUND:
        bind(world, driver.probe)


@operation(isolates=True, features=len(FEATURES) - 1)
def replug(world: World, features: int) -> None:
    """The device is unplugged, and another one, which offers something else, is plugged in."""
    bind(world, lambda: world.plug(features % len(FEATURES)))


@operation(isolates=True, weight=2, pages=3, order=len(ORDERS) - 1, trusted=2, bits=65535, fails=4)
def foreign_reports(world: World, pages: int, order: int, trusted: int, bits: int, fails: int) -> None:
    """Another driver than the balloon's hears of free memory for a while, and says what it likes of it."""
    driver = world.machine.driver
    if driver.state is not State.UNBOUND:
        with_device(world, driver.remove)
    if driver.state is not State.UNBOUND:
        return
    # What is dropped is no longer poison: a driver that knows of poisoning drops nothing.
    other = ForeignDriver(world, bits if not world.mm.config.page_poisoning else 0, fails)
    device = PageReportingDevInfo(
        report=other.report,
        capacity=CAPACITIES[pages % len(CAPACITIES)],
        order=ORDERS[order % len(ORDERS)],
        host_zeroes_pages=bool(trusted),
    )
    other.device = device
    reporting = world.mm.page_reporting
    reporting.register(device)
    reporting.flush(1 << 20)
    reporting.unregister(device)
    bind(world, driver.probe)


class ForeignDriver:
    """A driver that drops some blocks and sets their bits, touches no other bit, and fails at times."""

    device: PageReportingDevInfo

    def __init__(self, world: World, bits: int, fails: int) -> None:
        """Drop the blocks that `bits` says, one after the other; fail in the call number `fails`."""
        self.world, self.bits, self.fails, self.calls, self.blocks = world, bits, fails, 0, 0

    def report(self, entries: Sequence[tuple[Pfn, int]]) -> None:
        """Drop, answer, and perhaps fail at the end: what was dropped is not to be believed then."""
        host, device = self.world.host, self.device
        self.calls += 1
        good = self.calls != self.fails
        for i, (pfn, order) in enumerate(entries):
            drop = bool(self.bits >> self.blocks % 16 & 1)
            self.blocks += 1
            if drop:
                self.world.ram.discard(pfn * PAGE_SIZE, PAGE_SIZE << order)
                device.zeroed_bitmap[i] = True
            shown = drop and good and device.host_zeroes_pages
            host.told[pfn : pfn + (1 << order)] |= good
            host.zero[pfn : pfn + (1 << order)] = shown
            host.granted += (1 << order) if shown else 0
            if good:
                host.reports.append(Report(pfn, order, shown))
        if not good:
            raise DriverError("a driver of another kind fails")


def bind(world: World, call: Callable[[], object]) -> None:
    """Bind a driver; it may lack the memory to, and a silent host may not answer it."""
    silent = world.host.silent
    try:
        call()
    except OutOfMemory:
        pass
    except HostzeroError:
        if not silent:
            raise
    world.mm.page_reporting.order = world.setup["reporting"][1]


@operation(when=lambda world: Feature.FREE_PAGE_HINT in world.machine.device.acked, what=2)
def hint(world: World, what: int) -> None:
    """Free page hinting: the host asks for hints, stops, or is done."""
    device = world.machine.device
    if not device.live or Feature.FREE_PAGE_HINT not in device.acked:
        return
    with_device(world, (device.hint_start, device.hint_stop, device.hint_done)[what % 3])
