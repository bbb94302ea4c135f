# SPDX-License-Identifier: GPL-2.0-only
"""Steps of who stands between a guest and the device: queues served in turns, stopped and resumed.

Over vhost-user a paused or migrated guest is a queue that stops and goes on where it was, with the
features agreed on anew or not. The guest's memory may have changed in the meantime.
"""

from __future__ import annotations

from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_model import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, VERSION_1, Ring
from hostzero.check.wire.device_repertoire import operation
from hostzero.check.wire.device_steps import features, ring_layout, status


@operation
def kick_some(world: DeviceWorld, index: int, budget: int) -> None:
    """Have the device answer so many requests of a queue at most."""
    model = world.model
    budget = max(budget, 1)
    ring = model.rings.get(index) if model.live else None
    answered = 0
    if ring is not None:
        # What an interrupt does would count against the budget.
        world.plan_interrupt(0, 0, 0)
        answered = world.expect(ring, budget)
        ring.served = answered < budget
    more = world.call("a notification", ring is not None, world.device.serve, index, budget)
    if ring is not None and more != (answered == budget):
        world.fail("rot", "the device does not say whether its budget ran out", f"{answered} of {budget}")


@operation
def stop(world: DeviceWorld, index: int) -> None:
    """Stop a queue; what the device keeps goes back into the ring."""
    _stop(world, index)


@operation
def suspend(world: DeviceWorld) -> None:
    """Stop everything and forget the features, but not what the guest wrote."""
    model = world.model
    world.plan_interrupt(0, 0, 0, but=1)
    rings = dict(model.rings)
    for ring in rings.values():
        model.stop(ring)
    world.call("suspend", True, world.device.suspend)
    world.settle(final=True)
    world.stopped.update({index: ring for index, ring in rings.items() if model.rings.get(index) is ring})
    model.suspend()


@operation
def resume(world: DeviceWorld, index: int) -> None:
    """Set a queue up again that was stopped, where it was and where it had got to."""
    _resume(world, index)


@operation
def wake(world: DeviceWorld, word: int) -> None:
    """Agree on features, resume every queue that was stopped, and go on; without a reset."""
    status(world, ACKNOWLEDGE)
    status(world, ACKNOWLEDGE | DRIVER)
    features(world, (word & world.model.offered) | VERSION_1)
    status(world, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    for index in range(5):
        _resume(world, index)
    status(world, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)


@operation
def same_memory(world: DeviceWorld) -> None:
    """Tell the device of its memory once more."""
    allowed = not world.model.rings
    world.call("a guest memory", allowed, world.device.set_memory, world.memory)


def _stop(world: DeviceWorld, index: int) -> None:
    model = world.model
    ring = model.rings.get(index)
    if ring is not None:
        model.stop(ring)
    said = world.call("a stop", ring is not None, world.device.stop_queue, index)
    if ring is None:
        return
    # Once more: at its last interrupt the driver may have sent another buffer that is kept.
    wanted = model.stop(ring)
    if said != wanted:
        world.fail("rot", "a queue would not be resumed where it stopped", f"{said}, not {wanted}")
    world.settle(final=True)
    # A reset at its last interrupt may have taken it away.
    if model.rings.pop(index, None) is not None:
        world.stopped[index] = ring


def _resume(world: DeviceWorld, index: int) -> None:
    model = world.model
    stopped = world.stopped.get(index)
    if stopped is None or index in model.rings:
        return
    place = stopped.place
    layout = ring_layout(world, place)
    if layout is None:
        return
    role = model.role(index)
    allowed = role is not None and place.size <= model.sizes[role]
    if allowed and role is not None:
        del world.stopped[index]
        world.write(place.used + 2, stopped.last.to_bytes(2, "little"))
        model.rings[index] = Ring(role, place, stopped.last, stopped.last)
    world.call(
        "a queue",
        allowed,
        lambda: world.device.setup_queue(
            index, layout, lambda: world.interrupt(index), start_index=stopped.last, late=True
        ),
    )
