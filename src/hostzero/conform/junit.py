# SPDX-License-Identifier: GPL-2.0-only
"""A report as JUnit XML, which CI systems read: a suite for each group, a test case for each case."""

from __future__ import annotations

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from hostzero.conform.result import Outcome, Report, Result
from hostzero.conform.show import clause_name


def to_junit(report: Report) -> bytes:
    """Return the document: known deviations and cases that do not apply are skipped tests.

    Cases that did not run are errors: a reader must not take them for passed ones.
    """
    document = JUnitXml(f"hostzero conform {report.target}")
    suites: dict[str, TestSuite] = {}
    for result in report.results:
        suite = suites.setdefault(result.case.group, TestSuite(result.case.group))
        suite.add_testcase(_test_case(result, report))
    for suite in suites.values():
        document.add_testsuite(suite)
    if report.stale:
        suite = TestSuite("known deviations")
        for name, why in report.stale.items():
            test = TestCase(name, classname="hostzero.conform.known", time=0.0)
            test.result = [Failure(f"stale: {why}", "stale")]
            suite.add_testcase(test)
        document.add_testsuite(suite)
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]  # the library types its classes only
    return text


def _test_case(result: Result, report: Report) -> TestCase:
    test = TestCase(
        result.case.id,
        classname=f"hostzero.conform.{result.case.group.replace(' ', '_')}",
        time=result.seconds,
    )
    if result.outcome in {Outcome.NOT_APPLICABLE, Outcome.KNOWN}:
        test.result = [Skipped(f"{result.outcome.value}: {result.reason}")]
    elif result.outcome is Outcome.NOT_RUN:
        test.result = [Error(f"{result.outcome.value}: {result.reason}", result.outcome.value)]
    elif result.outcome is Outcome.FAIL or (result.outcome is Outcome.SHOULD and report.strict):
        miss = result.misses[0]
        failure = Failure(f"{clause_name(miss.clause)}: {miss.text}", miss.level.value)
        alone = report.alone(result)
        failure.text = "\n".join([*result.transcript, *([f"alone: {alone}"] if alone else [])])
        test.result = [failure]
    elif result.outcome is Outcome.SHOULD:
        test.system_out = "\n".join(
            f"{miss.level.value}, {clause_name(miss.clause)}: {miss.text}" for miss in result.misses
        )
    return test
