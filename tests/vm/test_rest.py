# SPDX-License-Identifier: GPL-2.0-only
"""When a device rests, and where its work ended: on made-up looks 50 ms apart."""

from __future__ import annotations

import random

import pytest

from hostzero.vm.rest import BUSY, STILL, Look, end_of_work, rate_of, rests

STEP = 0.05


def looks_of(used: list[float], backed: list[int] | None = None) -> list[Look]:
    """Return looks after each of which so many CPU seconds more had been used."""
    sizes = backed or [0] * len(used)
    total = [sum(used[: at + 1]) for at in range(len(used))]
    return [Look(at * STEP, device, size) for at, (device, size) in enumerate(zip(total, sizes, strict=True))]


def test_nobody_has_rested_longer_than_he_was_looked_at() -> None:
    assert not rests(looks_of([0.0]), 0.1)
    assert not rests(looks_of([0.0] * 10), 0.5)
    assert rests(looks_of([0.0] * 11), 0.5)


@pytest.mark.parametrize(("share", "rested"), [(0.9 * BUSY, True), (1.1 * BUSY, False)])
def test_a_rest_is_told_from_all_that_was_used_in_it(share: float, rested: bool) -> None:
    """One look may be a busy one: what QEMU's main thread uses at rest comes in lumps."""
    lumps = [20 * share * STEP if at % 20 == 0 else 0.0 for at in range(41)]
    assert rests(looks_of(lumps), 2.0) is rested


@pytest.mark.parametrize(("step", "rested"), [(STILL // 40, True), (STILL // 8, False), (-STILL // 8, False)])
def test_memory_that_comes_or_goes_is_no_rest(step: int, rested: bool) -> None:
    sizes = [10 * STILL + at * step for at in range(21)]
    assert rests(looks_of([0.0] * 21, sizes), 1.0) is rested


def test_work_ends_with_the_last_look_that_used_more_than_a_rest() -> None:
    looks = looks_of([0.0, 0.03, 0.03, 0.0, 0.01, 0.0, *[0.0005] * 20])
    assert end_of_work(looks, 0.01) == 4


def test_work_of_less_than_a_rest_may_use_is_not_lost() -> None:
    looks = looks_of([0.0, *[0.0] * 10, 0.02, 0.02, *[0.0] * 48])
    assert rests(looks, 3.0)
    assert end_of_work(looks, 0.0) == 12


def test_memory_that_went_last_is_the_end_of_work() -> None:
    sizes = [8 * STILL] * 9 + [2 * STILL] * 20
    assert end_of_work(looks_of([0.0] * 29, sizes), 0.0) == 9


def test_a_noisy_rest_hides_one_look_at_most() -> None:
    """A rest at 1.3 % in lumps; the work before it went on at 20 %."""
    source = random.Random(3)
    rest = [source.choice([0.0, 0.0005, 0.0008, 0.0013]) for _ in range(60)]
    looks = looks_of([*[0.01] * 20, *rest])
    assert rests(looks, 2.9)
    assert end_of_work(looks, rate_of(looks[20:])) in {18, 19}


def test_one_look_is_its_own_end() -> None:
    assert end_of_work(looks_of([0.5]), 0.0) == 0
