# SPDX-License-Identifier: GPL-2.0-only
"""A pytest plugin that writes down how each test ended: one line of JSON each, as it ends.

`tests.take_out` loads it into the run of a changed copy. The lines of a run that crashed are
those of the tests before the crash, so that no test seems to have failed that did not.

Who has seen one case of a test fail need not see the others, nor the smallest example for which
it fails: both are left out, for speed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

import hostzero
from hostzero.errors import HostzeroError

settings.register_profile(
    "verdicts",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

VARIABLE = "TAKE_OUT_VERDICTS"
"""The environment variable that names the file."""

PASSED = "passed"
FAILED = "failed"
"""By an assertion, or because hostzero itself found something wrong."""


def leaves(error: BaseException) -> list[BaseException]:
    """Return an error, or what a group of errors holds."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


def verdict(error: BaseException | None) -> str:
    """Return how a test ended that raised `error`: PASSED, FAILED, or the name of any other error."""
    if error is None:
        return PASSED
    for leaf in leaves(error):
        if isinstance(leaf, AssertionError | HostzeroError | pytest.fail.Exception):
            return FAILED
    return type(error).__name__


_failed: set[str] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out the other cases of a test that has failed."""
    if item.nodeid.partition("[")[0] in _failed:
        pytest.skip("another case of it has failed")


def _write(test: str, ending: str) -> None:
    line = {"test": test, "verdict": ending, "package": hostzero.__file__}
    with Path(os.environ[VARIABLE]).open("a") as out:
        out.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how the test itself ended; a fixture that raises is no verdict on the test."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if call.when == "call":
        ending = "skipped" if report.skipped else verdict(error)
        if ending == FAILED:
            _failed.add(item.nodeid.partition("[")[0])
        _write(item.nodeid, ending)
    elif error is not None:
        _write(item.nodeid, f"{call.when}: {type(error).__name__}")
    return report
