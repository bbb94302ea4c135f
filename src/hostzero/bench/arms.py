# SPDX-License-Identifier: GPL-2.0-only
"""Which features each arm's device offers, and what its guest does with its free memory."""

from __future__ import annotations

from typing import Final

from hostzero.bench.names import Arm, Scenario
from hostzero.device.config import DEFAULT_FEATURES
from hostzero.virtio.features import Feature

_INIT_BITS: Final = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
_REPORTING: Final = Feature.REPORTING | Feature.DEVICE_INIT_REPORTED

ARMS: Final = (Arm.NEVER_REPORTED, Arm.BASELINE, Arm.OPTIMIZED, Arm.NO_ZEROING)


def features(scenario: Scenario, arm: Arm) -> Feature:
    """Return what the device of one arm offers.

    The arms differ in bits 6 and 7 and in nothing else, but for `never-reported`, whose
    guest gives nothing away. The balloon scenario leaves reporting out of every arm, so
    that what it measures is bit 7 alone.
    """
    offered = DEFAULT_FEATURES
    if arm in (Arm.NEVER_REPORTED, Arm.BASELINE):
        offered &= ~_INIT_BITS
    if arm is Arm.NEVER_REPORTED or scenario is Scenario.BALLOON:
        offered &= ~_REPORTING
    return offered


def gives_memory_away(arm: Arm) -> bool:
    """Return whether the arm's guest gives its free memory to the host before a phase."""
    return arm is not Arm.NEVER_REPORTED
