# SPDX-License-Identifier: GPL-2.0-only
"""The arms differ in the bits that are measured, and in nothing else."""

from __future__ import annotations

import pytest

from hostzero.bench.arms import ARMS, features, gives_memory_away
from hostzero.bench.names import COMPARISONS, TIMED, Arm, Scenario
from hostzero.device import DeviceConfig
from hostzero.device.config import DEFAULT_FEATURES
from hostzero.virtio.features import Feature

BIT6 = Feature.DEVICE_INIT_REPORTED
BIT7 = Feature.DEVICE_INIT_ON_INFLATE
REPORTED = (Scenario.THP, Scenario.SMALL_PAGES)


def test_every_arm_runs_once() -> None:
    assert sorted(ARMS) == sorted(Arm)


def test_every_comparison_is_of_arms_that_run() -> None:
    assert {arm for pair in COMPARISONS for arm in pair} <= set(ARMS)


@pytest.mark.parametrize("scenario", REPORTED)
def test_arms_of_reported_memory_differ_in_bits_6_and_7(scenario: Scenario) -> None:
    assert features(scenario, Arm.OPTIMIZED) == DEFAULT_FEATURES
    assert features(scenario, Arm.BASELINE) == DEFAULT_FEATURES & ~(BIT6 | BIT7)
    assert features(scenario, Arm.NO_ZEROING) == DEFAULT_FEATURES
    assert features(scenario, Arm.NEVER_REPORTED) == DEFAULT_FEATURES & ~(BIT6 | BIT7 | Feature.REPORTING)


def test_arms_of_the_balloon_differ_in_bit_7_alone() -> None:
    without = DEFAULT_FEATURES & ~(BIT6 | BIT7 | Feature.REPORTING)
    assert {arm: features(Scenario.BALLOON, arm) for arm in ARMS} == {
        Arm.NEVER_REPORTED: without,
        Arm.BASELINE: without,
        Arm.OPTIMIZED: without | BIT7,
        Arm.NO_ZEROING: without | BIT7,
    }


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("scenario", TIMED)
def test_a_device_can_offer_them(scenario: Scenario, arm: Arm) -> None:
    offered = DeviceConfig(features=features(scenario, arm)).offered
    assert offered == features(scenario, arm) | Feature.VERSION_1


def test_only_never_reported_keeps_its_memory() -> None:
    assert [arm for arm in ARMS if not gives_memory_away(arm)] == [Arm.NEVER_REPORTED]
