# SPDX-License-Identifier: GPL-2.0-only
"""The second reading of what a driver may accept: it agrees with the first, and disagrees with mistakes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hostzero.check.wire.features import wrong_feature
from hostzero.driver.validate import GuestFacts, virtballoon_validate
from hostzero.mm import MmConfig
from hostzero.virtio.features import Feature

GUESTS: list[dict[str, Any]] = [
    {"init_on_free": free, "page_poisoning": poison, "confidential": secret}
    for free, poison, secret in itertools.product((False, True), repeat=3)
]
BITS = [
    Feature.REPORTING,
    Feature.PAGE_POISON,
    Feature.DEVICE_INIT_REPORTED,
    Feature.DEVICE_INIT_ON_INFLATE,
    Feature.RING_INDIRECT_DESC,
    Feature.ACCESS_PLATFORM,
]


@pytest.mark.parametrize("guest", GUESTS)
def test_the_driver_chooses_as_the_second_reading_wants(guest: dict[str, Any]) -> None:
    for chosen in itertools.product((False, True), repeat=len(BITS)):
        offered = sum(int(bit) for bit, on in zip(BITS, chosen, strict=True) if on) | int(Feature.VERSION_1)
        accepted = int(virtballoon_validate(offered, GuestFacts(**guest)))
        assert wrong_feature(offered, accepted, MmConfig(**guest)) is None


@pytest.mark.parametrize(
    ("accepted", "guest", "kind"),
    [
        (Feature.REPORTING | Feature.FREE_PAGE_HINT, {}, "rot"),
        (Feature.RING_INDIRECT_DESC, {}, "rot"),
        (Feature.PAGE_POISON | Feature.REPORTING, {}, "rot"),
        (Feature.REPORTING, {"init_on_free": True}, "corruption"),
        (Feature.DEVICE_INIT_REPORTED, {}, "rot"),
        (Feature.DEVICE_INIT_ON_INFLATE, {"confidential": True}, "corruption"),
        (Feature.DEVICE_INIT_ON_INFLATE, {"page_poisoning": True}, "corruption"),
        (Feature.REPORTING | Feature.DEVICE_INIT_ON_INFLATE, {}, "lost"),
        (Feature.REPORTING | Feature.DEVICE_INIT_REPORTED, {}, "lost"),
        (0, {}, "lost"),
    ],
)
def test_a_mistake_is_named(accepted: int, guest: dict[str, Any], kind: str) -> None:
    offered = sum(int(bit) for bit in BITS)
    found = wrong_feature(offered, int(accepted), MmConfig(**guest))
    assert found is not None
    assert found[0] == kind
