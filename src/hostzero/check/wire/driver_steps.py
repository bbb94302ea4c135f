# SPDX-License-Identifier: GPL-2.0-only
"""The steps of a hostile host and of its guest: each takes a `DriverWorld` and integers."""

from __future__ import annotations

import numpy as np

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.driver import CHANGED, FILL, DriverWorld, operation
from hostzero.check.wire.false_device import LIES
from hostzero.driver import State
from hostzero.mm.contig import alloc_contig_frozen_range, free_contig_frozen_range
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.page_flags import PGTY_buddy


@operation
def probe(world: DriverWorld, offered: int, *sizes: int) -> None:
    """Bind the driver to a device that offers bits, with queues of these sizes by number."""
    if world.driver.state is not State.UNBOUND:
        return
    world.device.offered = offered & (1 << 64) - 1
    for index, size in enumerate(sizes[:5]):
        world.device.sizes[index] = size
    world.call("probe", world.driver.probe)


@operation
def remove(world: DriverWorld) -> None:
    """Take the driver off."""
    if world.driver.state is not State.UNBOUND:
        world.call("remove", world.driver.remove)


@operation
def freeze(world: DriverWorld) -> None:
    """Suspend."""
    if world.driver.state in {State.ACTIVE, State.FAILED}:
        world.call("freeze", world.driver.freeze)


@operation
def restore(world: DriverWorld, hibernated: int) -> None:
    """Resume; after hibernation free pages hold anything."""
    if world.driver.state is not State.FROZEN:
        return
    if hibernated & 1:
        pages = world.mm.mem.mem_map[: world.mm.nr_pages]
        for pfn in np.flatnonzero(pages["page_type"] == PGTY_buddy).tolist():
            world.bytes[pfn * PAGE : (pfn + (1 << int(pages[pfn].private))) * PAGE] = FILL
    device = world.device
    agreed = device.offered_then
    known = set(world.marked())
    world.call("restore", lambda: world.driver.restore(hibernated=bool(hibernated & 1)))
    if device.acked & ~device.offered_then:
        world.fail("rot", "a driver goes on with a feature that is not offered any more")
    if not hibernated & 1:
        world.check_kept(known)
    # It goes on with what it had, even if more is offered now.
    device.offered_then = agreed


@operation
def flush(world: DriverWorld, order: int) -> None:
    """Report free blocks of some order and above, all of them."""
    world.mm.page_reporting.order = min(max(order, 0), 9)
    world.call("a flush", world.mm.page_reporting.flush, 1 << 20)


@operation
def target(world: DriverWorld, pages: int) -> None:
    """Ask for a balloon of so many pages."""
    world.device.num_pages = pages
    world.call(CHANGED, world.device.change_config)


@operation
def command(world: DriverWorld, cmd_id: int) -> None:
    """Set the command of free page hinting."""
    world.device.cmd_id = cmd_id
    world.call(CHANGED, world.device.change_config)


@operation
def offer(world: DriverWorld, offered: int) -> None:
    """Offer other bits than before, to whoever asks next."""
    world.device.offered = offered & (1 << 64) - 1


@operation
def resize(world: DriverWorld, index: int, size: int) -> None:
    """Say that a queue has another size, to whoever asks next."""
    world.device.sizes[index % 5] = size


@operation
def interrupt(world: DriverWorld, index: int) -> None:
    """Interrupt for a queue, whether there is anything in it or not."""
    ring = world.device.rings.get(index)
    if ring is not None:
        world.call("an interrupt", ring.interrupt)


@operation
def stats(world: DriverWorld) -> None:
    """Return the buffers that are kept."""
    world.call("an interrupt", world.device.give_stats_back)


@operation
def needs_reset(world: DriverWorld) -> None:
    """Ask for a reset."""
    world.device.needs_reset()
    world.call(CHANGED, world.device.change_config)


@operation
def advance(world: DriverWorld, centiseconds: int) -> None:
    """Let guest time pass."""
    world.call("the clock", world.mm.clock.advance, min(max(centiseconds, 0), 1000) / 100)


@operation
def alloc(world: DriverWorld, order: int, zero: int) -> None:
    """Allocate a block for a user."""
    world.allocate(min(max(order, 0), 9), zero=bool(zero & 1))


@operation
def free(world: DriverWorld, which: int) -> None:
    """Free a user's block."""
    world.free(which)


@operation
def compact(world: DriverWorld) -> None:
    """Compact memory, balloon pages included."""
    world.call("compaction", world.mm.compact_memory)


@operation
def hog(world: DriverWorld, leave: int) -> None:
    """Have users take what is free, down to some pages."""
    world.hog(max(leave, 0))


@operation
def contig(world: DriverWorld, first: int, order: int) -> None:
    """Take a range of pages for a moment: what can be moved is moved away."""
    order = min(max(order, 0), 9)
    start = (first << order) % world.mm.nr_pages
    end = start + (1 << order)
    if world.call("a range", lambda: alloc_contig_frozen_range(world.mm, start, end, GFP_KERNEL)):
        world.call("a free", free_contig_frozen_range, world.mm, start, order)


@operation
def lie(world: DriverWorld, kind: int, value: int) -> None:
    """Plan how the next request without a plan is answered."""
    world.device.plan.append((kind % LIES, value))


@operation
def fault(world: DriverWorld, which: int, value: int) -> None:
    """Break the transport itself: features, resets, the configuration space, or any call."""
    device = world.device
    if which == 0:
        device.refuses_features = bool(value & 1)
    elif which == 1:
        device.never_resets = bool(value & 1)
        world.leaks = True
    elif which == 2:
        device.config_cut = min(max(value, 0), 4)
    elif which == 3:
        device.raise_after = min(max(value, 0), 200)
        # A reset that cannot be written is a reset that did not happen.
        world.leaks = True


@operation
def end(world: DriverWorld) -> None:
    """Turn honest and see what is left."""
    world.end()
