# SPDX-License-Identifier: GPL-2.0-only
"""Wrong in what they offer, accept and remember, and in how they count their queues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hostzero.device import BalloonDevice
from hostzero.errors import DeviceError
from hostzero.units import Gpa
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.ring_layout import RingLayout
from hostzero.virtio.transport import Status
from tests.conform.wrong.device import WrongDevice, patched

Right = BalloonDevice


def offers(change: Callable[[int], int]) -> Any:
    return patched(device_features=lambda self: change(Right.device_features(self)))


no_version_1 = offers(lambda bits: bits & ~Feature.VERSION_1)
undefined_bit = offers(lambda bits: bits | 1 << 20)
bit6_alone = offers(lambda bits: bits & ~Feature.REPORTING)
offers_less_after_reset = patched(
    device_features=lambda self: (
        Right.device_features(self) & ~(Feature.STATS_VQ if self.metrics.resets else 0)
    )
)


def refuses(when: Callable[[WrongDevice, Feature], bool]) -> Any:
    def set_status(self: WrongDevice, status: int) -> None:
        if status & Status.FEATURES_OK and when(self, self._driver_features):
            status &= ~Status.FEATURES_OK
        Right.set_status(self, status)

    return patched(set_status=set_status)


BOTH = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
refuses_both_bits = refuses(lambda _, features: features & BOTH == BOTH)
needs_stats = refuses(lambda _, features: Feature.STATS_VQ not in features)
only_once = refuses(lambda self, _: bool(self.metrics.resets))

takes_unoffered = patched(
    set_driver_features=lambda self, features: Right.set_driver_features(
        self, features & Right.device_features(self)
    )
)
forgets_acknowledge = patched(status=lambda self: Right.status(self) & ~int(Status.ACKNOWLEDGE))


class Eager(WrongDevice):
    """Serves a queue as soon as it is set up."""

    def poll(self) -> None:
        for server in list(self._queues.values()):
            server.serve()


class NoReset(WrongDevice):
    def set_status(self, status: int) -> None:
        if status:
            super().set_status(status)


class HoldsOn(WrongDevice):
    """Goes on with the rings of before a reset."""

    def reset(self) -> None:
        old = list(self._queues.values())
        for server in old:
            server.queue.release = lambda: None  # type: ignore[method-assign]
        super().reset()
        self.old = old

    def poll(self) -> None:
        for server in getattr(self, "old", []):
            if server.role is QueueRole.DEFLATE:
                server.serve()


class RemembersFeatures(WrongDevice):
    """Takes what a driver accepts as an addition to what the last one did."""

    before = Feature(0)

    def set_driver_features(self, features: int) -> None:
        super().set_driver_features(int(Feature(features) | self.before))

    def reset(self) -> None:
        self.before = self.acked
        super().reset()


class OtherNumbers(WrongDevice):
    def numbers(self) -> tuple[QueueRole | None, ...]:
        roles = list(queue_roles(self.acked))
        if QueueRole.STATS in roles and QueueRole.FREE_PAGE in roles:
            stats, hint = roles.index(QueueRole.STATS), roles.index(QueueRole.FREE_PAGE)
            roles[stats], roles[hint] = roles[hint], roles[stats]
        return tuple(roles)

    def queue_role(self, index: int) -> QueueRole | None:
        if not self._status & Status.FEATURES_OK:
            return None
        numbers = self.numbers()
        return numbers[index] if 0 <= index < len(numbers) else None


class NumbersOverOffered(OtherNumbers):
    """Counts as QEMU does: over what it offers."""

    def numbers(self) -> tuple[QueueRole | None, ...]:
        accepted = queue_roles(self.acked)
        return tuple(role if role in accepted else None for role in queue_roles(self.config.offered))


def _one_queue_more(self: WrongDevice, index: int) -> int:
    return 8 if index == 5 else Right.queue_size_max(self, index)


one_queue_more = patched(queue_size_max=_one_queue_more)


def _full_rings_only(
    self: WrongDevice, index: int, layout: RingLayout, interrupt: Callable[[], None], **more: Any
) -> None:
    if layout.size < 16:
        raise DeviceError(f"a ring of {layout.size} is too small")
    Right.setup_queue(self, index, layout, interrupt, **more)


full_rings_only = patched(setup_queue=_full_rings_only)


class WritesDescriptors(WrongDevice):
    def notify(self, index: int) -> None:
        super().notify(index)
        layout = self._queues[index].queue.layout
        self.memory.write(Gpa(layout.desc + 8), b"\0\0\0\0")
