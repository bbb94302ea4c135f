# SPDX-License-Identifier: GPL-2.0-only
"""When `make series` takes a mutant for killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hostzero.check.teeth.mutants import read_all
from hostzero.errors import VmBug
from tests.take_out import Outcome, summary
from tests.verdicts import FAILED, PASSED, verdict


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ([PASSED, PASSED], PASSED),
        ([PASSED, FAILED, "skipped"], FAILED),
        ([PASSED, "TypeError"], "TypeError"),
        (["setup: KeyError"], "setup: KeyError"),
        ([], "no verdict"),
    ],
)
def test_one_failing_case_is_a_failure_and_silence_is_not(endings: list[str], expected: str) -> None:
    assert summary(endings) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: None, PASSED),
        (lambda: AssertionError("no"), FAILED),
        (lambda: VmBug("no"), FAILED),
        (lambda: ExceptionGroup("two", [TypeError(), ExceptionGroup("one", [AssertionError()])]), FAILED),
        (lambda: TypeError("no"), "TypeError"),
        (lambda: ExceptionGroup("two", [TypeError(), KeyError()]), "ExceptionGroup"),
    ],
)
def test_only_assertions_and_own_errors_count(
    error: Callable[[], BaseException | None], expected: str
) -> None:
    assert verdict(error()) == expected


def test_a_mutant_is_killed_if_every_test_fails() -> None:
    mutant = read_all()[0]
    assert Outcome(mutant, {"a": FAILED, "b": FAILED}).killed
    assert not Outcome(mutant, {"a": FAILED, "b": PASSED}).killed
