# SPDX-License-Identifier: GPL-2.0-only
"""A stock driver and our device find each other."""

from __future__ import annotations

from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature
from hostzero.vm.command_line import HOSTZERO_SLOT
from hostzero.vm.pci import offered_features
from hostzero.vm.steps import MIB, wait_balloon_pages
from hostzero.vm.wait import wait_for
from tests_vm.conftest import Start

INIT_REPORTED, INIT_ON_INFLATE = 6, 7


def numbers(names: list[str]) -> set[int]:
    return {int(Feature[name.upper().replace("-", "_")]).bit_length() - 1 for name in names}


def test_a_stock_driver_takes_what_it_knows_and_the_guest_sees_bits_6_and_7(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        status = backend.status()["device"]
        acked = guest.acked_features("hostzero")
        offered = offered_features(guest, HOSTZERO_SLOT)
        assert {INIT_REPORTED, INIT_ON_INFLATE} <= offered
        assert not acked & {INIT_REPORTED, INIT_ON_INFLATE}
        assert acked <= offered
        assert numbers(status["features_offered"]) == offered
        assert numbers(status["features_acked"]) == acked
        assert {1, 2, 5, 32} <= acked  # statistics, deflate on OOM, reporting, VERSION_1
        assert status["live"]


def test_a_device_that_offers_less_is_seen_to(start: Start) -> None:
    with start(features="-device-init-reported,-device-init-on-inflate,-reporting") as (guest, _):
        guest.load_driver()
        assert not offered_features(guest, HOSTZERO_SLOT) & {5, INIT_REPORTED, INIT_ON_INFLATE}
        assert 5 not in guest.acked_features("hostzero")


def test_the_driver_can_go_and_come_again(start: Start) -> None:
    with start() as (guest, backend):
        for _ in range(3):
            guest.load_driver()
            backend.resize(64 * MIB)
            wait_for(lambda: backend.actual() == 64 * MIB, "inflated", 120)
            guest.unload_driver()
            assert guest.balloon_pages() == 0
            assert not backend.status()["device"]["live"]
            # A target that is set while there is no driver is read by the next one.
            backend.resize(32 * MIB)
            guest.load_driver()
            wait_for(lambda: backend.actual() == 32 * MIB, "read at probe", 120)
            wait_balloon_pages(guest, 32 * MIB // PAGE_SIZE)
            guest.unload_driver()
