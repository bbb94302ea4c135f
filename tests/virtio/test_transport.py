# SPDX-License-Identifier: GPL-2.0-only
"""The device status bits, and what counts as a transport."""

from __future__ import annotations

from hostzero.virtio import Status, Transport


def test_status_bits_are_those_of_clause_2_1() -> None:
    assert {status.name: status.value for status in Status} == {
        "ACKNOWLEDGE": 1,
        "DRIVER": 2,
        "DRIVER_OK": 4,
        "FEATURES_OK": 8,
        "NEEDS_RESET": 64,
        "FAILED": 128,
    }


def test_something_without_the_calls_is_no_transport() -> None:
    assert not isinstance(object(), Transport)
