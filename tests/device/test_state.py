# SPDX-License-Identifier: GPL-2.0-only
"""When the guest expects something other than zero."""

from __future__ import annotations

import pytest

from hostzero.device.discard import Discarder
from hostzero.device.state import DeviceState
from hostzero.ram import GuestMemory, Ram
from hostzero.virtio.features import Feature


@pytest.mark.parametrize(
    ("acked", "poison_val", "poisoned"),
    [
        (Feature.PAGE_POISON, 0, False),
        (Feature.PAGE_POISON, 1 << 31, True),
        (Feature.REPORTING, 0xAAAA_AAAA, False),
    ],
)
def test_poison_needs_the_feature_and_a_value(
    ram: Ram, acked: Feature, poison_val: int, poisoned: bool
) -> None:
    state = DeviceState(Discarder(GuestMemory.whole(ram)), acked=acked)
    state.space.poison_val = poison_val
    assert state.poisoned is poisoned
