# SPDX-License-Identifier: GPL-2.0-only
"""Each case passes against the right device, and fails against a wrong one."""

from __future__ import annotations

import pytest

from hostzero.conform.case import LESSONS, Case
from hostzero.conform.in_process import everything
from hostzero.conform.judge import Level
from hostzero.conform.result import Outcome
from hostzero.conform.run import run_case
from hostzero.conform.suite import all_cases, select
from hostzero.errors import UsageError
from tests.conform.catches import CATCHES
from tests.conform.wrong.device import WrongTarget

CASES = all_cases()
ON_HUGE_PAGES = {"inflate-huge-host-page"}


def identify(case: Case) -> str:
    return case.id


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_the_right_device_passes(case: Case) -> None:
    result = run_case(WrongTarget(everything, huge=case.id in ON_HUGE_PAGES), case)
    assert result.outcome is Outcome.PASS, [*result.misses, *result.transcript]


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_a_wrong_device_is_caught(case: Case) -> None:
    result = run_case(WrongTarget(CATCHES[case.id], huge=case.id in ON_HUGE_PAGES), case)
    assert result.outcome in {Outcome.FAIL, Outcome.SHOULD}, result
    assert result.misses
    if result.outcome is Outcome.SHOULD:
        assert {miss.level for miss in result.misses} == {Level.SHOULD}


def test_every_case_has_its_wrong_device_and_no_other_has() -> None:
    assert set(CATCHES) == {case.id for case in CASES}


def test_every_lesson_is_a_case() -> None:
    assert {lesson for case in CASES for lesson in case.lessons} == set(LESSONS)


def test_a_name_selects_a_case_or_all_that_begin_so() -> None:
    assert [case.id for case in select(["bit6-twice"])] == ["bit6-twice"]
    assert {case.group for case in select(["bit6-"])} == {"bit6"}
    assert [case.id for case in select(["inflate-again", "negotiate-again"])] == [
        "negotiate-again",
        "inflate-again",
    ]
    assert select([]) == CASES


def test_an_id_that_begins_others_means_itself() -> None:
    assert [case.id for case in select(["notify-event"])] == ["notify-event"]


def test_a_name_that_means_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="--case bit8"):
        select(["bit8"])
