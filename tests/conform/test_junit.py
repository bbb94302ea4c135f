# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

from hostzero.conform.junit import to_junit
from hostzero.conform.result import Outcome, Result
from tests.conform.results import ABSENT, FAILED, LEFT, MISSED, PASSED, report


def junit_of(
    *results: Result, strict: bool = False, stale: dict[str, str] | None = None
) -> dict[str, ET.Element]:
    root = ET.fromstring(to_junit(report(*results, strict=strict, stale=stale)))
    assert root.tag == "testsuites"
    return {test.attrib["name"]: test for test in root.iter("testcase")}


def test_each_case_is_a_test_in_the_suite_of_its_group() -> None:
    root = ET.fromstring(to_junit(report(PASSED, FAILED, MISSED)))
    assert [suite.attrib["name"] for suite in root] == ["inflate", "negotiation"]
    assert [suite.attrib["tests"] for suite in root] == ["2", "1"]
    assert root[0].attrib["failures"] == "1"


def test_a_failure_has_clause_text_transcript_and_how_to_run_it_alone() -> None:
    failure = junit_of(PASSED, FAILED)["inflate-bad"].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "virtio 1.3, 2.7.8.2: the used length is [4], not 0"
    assert failure.attrib["type"] == "must"
    assert failure.text == (
        "-> inflate\n<- used length 4\nalone: hostzero conform 'unix:/run/my socket' --case inflate-bad"
    )


def test_a_passed_case_has_its_time_and_nothing_else() -> None:
    test = junit_of(PASSED)["inflate-good"]
    assert float(test.attrib["time"]) == 0.5
    assert list(test) == []


def test_a_missed_should_is_output_unless_strict() -> None:
    lenient = junit_of(MISSED)["negotiate-some"]
    assert lenient.find("failure") is None
    assert "a subset is refused" in lenient.findtext("system-out", "")
    assert junit_of(MISSED, strict=True)["negotiate-some"].find("failure") is not None


def test_what_does_not_apply_and_what_is_known_is_skipped() -> None:
    known = replace(FAILED, outcome=Outcome.KNOWN, reason="tracker 7")
    tests = junit_of(ABSENT, known)
    for name, why in (
        ("stats-none", "stats-vq is not offered"),
        ("inflate-bad", "known deviation: tracker 7"),
    ):
        skipped = tests[name].find("skipped")
        assert skipped is not None
        assert why in skipped.attrib["message"]


def test_a_case_that_did_not_run_is_an_error() -> None:
    error = junit_of(PASSED, LEFT)["poison-late"].find("error")
    assert error is not None
    assert error.attrib["message"] == "not run: the target is gone: it [ended]"


def test_a_stale_entry_is_a_failure() -> None:
    failure = junit_of(PASSED, stale={"inflate-good": "the case passes"})["inflate-good"]
    assert failure is not None
    root = ET.fromstring(to_junit(report(PASSED, stale={"inflate-gone": "there is no such case"})))
    (stale,) = (suite for suite in root if suite.attrib["name"] == "known deviations")
    assert stale[0].find("failure") is not None
