# SPDX-License-Identifier: GPL-2.0-only
"""What is left after shrinking still fails, and not one step of it can be spared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.check.shrink import PAIRS_UP_TO, shrink_arguments, shrink_steps

Steps = Sequence[list[object]]


def holds_in_order(wanted: Sequence[int]) -> Callable[[Sequence[int]], bool]:
    """Return what fails if `wanted` are among the steps, in their order, others between them or not."""

    def fails(steps: Sequence[int]) -> bool:
        rest = iter(steps)
        return all(step in rest for step in wanted)

    return fails


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (range(100), [17]),
        (range(100), [0, 99]),
        (range(100), [3, 4, 5, 50, 98]),
        (range(8), list(range(8))),
        ([1], [1]),
        ([2, 1, 2, 1, 2], [1, 2]),
    ],
)
def test_what_matters_is_left(steps: Sequence[int], wanted: list[int]) -> None:
    assert shrink_steps(steps, holds_in_order(wanted)) == wanted


def test_what_always_fails_needs_no_step() -> None:
    assert shrink_steps([1, 2, 3], lambda _: True) == []
    assert shrink_steps([], lambda _: True) == []


def test_pairs_that_only_go_together_are_left_out_together() -> None:
    """A free needs its allocation, and neither goes alone."""

    def fails(steps: Sequence[str]) -> bool:
        held = 0
        for step in steps:
            held += {"alloc": 1, "free": -1}.get(step, 0)
            if held < 0:
                return False
        return held == 0 and "bug" in steps

    steps = ["alloc", "free"] * 20 + ["bug"] + ["alloc", "free"] * 20
    assert shrink_steps(steps, fails) == ["bug"]
    around = ["alloc"] * 10 + ["bug"] + ["free"] * 10
    assert shrink_steps(around, fails) == ["bug"]


def test_the_number_of_tries_stays_small() -> None:
    tries = 0
    fails = holds_in_order([500, 501, 900])

    def counted(steps: Sequence[int]) -> bool:
        nonlocal tries
        tries += 1
        return fails(steps)

    assert shrink_steps(range(1000), counted) == [500, 501, 900]
    assert tries < 150


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.data())
def test_the_result_fails_and_no_step_can_be_spared(steps: list[int], data: st.DataObject) -> None:
    # Whether a sequence fails is drawn: by the sums of its steps, which no order of removal favours.
    modulus = data.draw(st.integers(1, 12))
    target = sum(steps) % modulus
    least = data.draw(st.integers(0, len(set(steps))))

    def fails(candidate: Sequence[int]) -> bool:
        return sum(candidate) % modulus == target and len(set(candidate)) >= least

    left = shrink_steps(steps, fails)
    rest = iter(steps)
    assert all(step in rest for step in left)  # nothing is added, and the order stays
    assert fails(left)
    assert not any(fails(left[:at] + left[at + 1 :]) for at in range(len(left)))
    if len(left) <= PAIRS_UP_TO:
        kept = itertools.combinations(left, len(left) - 2) if len(left) > 1 else ()
        assert not any(fails(candidate) for candidate in kept)


def test_arguments_become_as_small_as_they_can_be() -> None:
    def fails(steps: Steps) -> bool:
        (_, pfn, _), (_, offset) = steps
        assert isinstance(pfn, int)
        assert isinstance(offset, int)
        return pfn >= 37 and offset >= 1000

    assert shrink_arguments([["alloc", 60, 3], ["write", 1 << 40]], fails) == [
        ["alloc", 37, 0],
        ["write", 1000],
    ]


def test_only_whole_numbers_above_zero_are_tried() -> None:
    steps: list[list[object]] = [["7", True, "5", -3, None, [4], 2.5, 0]]
    assert shrink_arguments(steps, lambda _: True) == steps


def test_the_steps_that_were_given_are_left_alone() -> None:
    steps: list[list[object]] = [["alloc", 9]]
    assert shrink_arguments(steps, lambda _: True) == [["alloc", 0]]
    assert steps == [["alloc", 9]]


@given(st.lists(st.tuples(st.integers(0, 1 << 48), st.integers(0, 1 << 48)), min_size=1, max_size=4))
def test_no_argument_can_be_less_by_one(bounds: list[tuple[int, int]]) -> None:
    least = [min(pair) for pair in bounds]
    steps: list[list[object]] = [["step", max(pair)] for pair in bounds]

    def fails(candidate: Steps) -> bool:
        return all(step[1] >= bound for step, bound in zip(candidate, least, strict=True))  # type: ignore[operator]

    assert shrink_arguments(steps, fails) == [["step", bound] for bound in least]


def test_a_number_takes_few_tries() -> None:
    tries = 0

    def fails(steps: Steps) -> bool:
        nonlocal tries
        tries += 1
        return steps[0][1] == 1 << 60

    assert shrink_arguments([["step", 1 << 60]], fails) == [["step", 1 << 60]]
    assert tries <= 62
