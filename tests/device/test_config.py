# SPDX-License-Identifier: GPL-2.0-only
"""What a device may offer."""

from __future__ import annotations

import pytest

from hostzero.device.config import DEFAULT_FEATURES, IMPLEMENTED, DeviceConfig
from hostzero.errors import UsageError
from hostzero.virtio.features import Feature, QueueRole


def test_default_offers_bits_6_and_7_but_not_what_changes_the_driver() -> None:
    assert int(DEFAULT_FEATURES) == 0b1110_1110 | 1 << 29 | 1 << 32


def test_bits_0_to_7_and_the_two_of_the_ring_are_implemented() -> None:
    assert int(IMPLEMENTED) == 0xFF | 1 << 29 | 1 << 32


def test_version_1_is_always_offered() -> None:
    assert DeviceConfig(features=Feature(0)).offered == Feature.VERSION_1


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        (Feature.ACCESS_PLATFORM, "access-platform"),
        (Feature.RING_INDIRECT_DESC, "ring-indirect-desc"),
        (Feature(1 << 50), "bit-50"),
    ],
)
def test_a_feature_that_is_not_implemented_is_refused_by_name(feature: Feature, name: str) -> None:
    with pytest.raises(UsageError, match=f"does not implement {name}$"):
        DeviceConfig(features=feature | Feature.REPORTING)


def test_bit_6_needs_reporting() -> None:
    with pytest.raises(UsageError, match="offer reporting too"):
        DeviceConfig(features=Feature.DEVICE_INIT_REPORTED)


def test_queue_sizes_default_to_those_of_qemu() -> None:
    config = DeviceConfig(queue_sizes={QueueRole.REPORTING: 8})
    assert [config.queue_size(role) for role in QueueRole] == [128, 128, 128, 1024, 8]


@pytest.mark.parametrize("size", [0, 3, -2, 65536])
def test_a_queue_size_that_no_ring_has_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"inflate queue cannot have {size} entries"):
        DeviceConfig(queue_sizes={QueueRole.INFLATE: size})
