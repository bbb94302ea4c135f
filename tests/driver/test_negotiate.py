# SPDX-License-Identifier: GPL-2.0-only
"""The status dance of virtio 1.3, 3.1.1."""

from __future__ import annotations

import pytest

from hostzero.driver import State
from hostzero.driver.negotiate import reset
from hostzero.errors import DriverError, NegotiationError
from hostzero.virtio import Feature
from tests.driver.conftest import MakeGuest
from tests.driver.fakes import ALL_FEATURES


def test_probe_takes_the_steps_in_order(make_guest: MakeGuest) -> None:
    """Reset, ACKNOWLEDGE, DRIVER, FEATURES_OK, queues, DRIVER_OK, and only then a notification."""
    guest = make_guest()
    assert guest.device.log[:10] == [
        "status 0x0",
        "status 0x1",
        "status 0x3",
        "status 0xb",
        "setup 0",
        "setup 1",
        "setup 2",
        "setup 3",
        "setup 4",
        "status 0xf",
    ]
    assert guest.device.log[10] == "notify 2", "the statistics buffer"


def test_a_device_that_refuses_the_features_fails_the_probe(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False, refuse_features=True)
    before = guest.mm.nr_free
    with pytest.raises(NegotiationError, match="refuses the features stats-vq"):
        guest.driver.probe()
    assert guest.driver.state is State.UNBOUND
    guest.check_nothing_left(before)


def test_a_legacy_device_is_refused(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False, features=int(ALL_FEATURES & ~Feature.VERSION_1))
    with pytest.raises(NegotiationError, match="does not offer VERSION_1"):
        guest.driver.probe()


def test_unknown_bits_are_not_acknowledged(make_guest: MakeGuest) -> None:
    guest = make_guest(features=int(ALL_FEATURES) | 1 << 40 | 1 << 28 | 1 << 33)
    assert guest.device.acked == ALL_FEATURES & ~Feature.PAGE_POISON == guest.driver.features


def test_event_idx_is_used_if_offered(make_guest: MakeGuest) -> None:
    """Several requests on one queue, so that the suppression has something to suppress."""
    guest = make_guest(features=int(ALL_FEATURES | Feature.RING_EVENT_IDX))
    assert Feature.RING_EVENT_IDX in guest.driver.features
    guest.device.set_target(1000)
    guest.device.set_target(0)
    assert guest.mm.page_reporting.report([(512, 9), (1024, 9)]) == [True, True]


def test_a_reset_that_does_not_show_is_an_error(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.device.never_resets = True
    with pytest.raises(DriverError, match="did not reset: its status reads 0xf"):
        reset(guest.device)
