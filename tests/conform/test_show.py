# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from hostzero.conform.result import Outcome, Report
from hostzero.conform.show import clause_name, print_cases, print_report, summary
from hostzero.conform.suite import select
from tests.conform.results import ABSENT, FAILED, LEFT, MISSED, PASSED, report


def shown(what: Report, *, verbose: bool = False) -> str:
    console = Console(file=io.StringIO(), width=118)
    print_report(what, console, verbose=verbose)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_failure_shows_clause_transcript_and_how_to_run_it_alone() -> None:
    text = shown(report(PASSED, FAILED))
    assert "fail inflate-bad: inflate-bad does what it has to" in text
    assert "must, virtio 1.3, 2.7.8.2: the used length is [4], not 0" in text
    assert "should, virtio 1.3, 2.2.2: a subset is refused" in text
    assert "-> inflate" in text
    assert "<- used length 4" in text
    assert "alone: hostzero conform 'unix:/run/my socket' --case inflate-bad" in text


def test_a_report_without_a_command_line_names_none() -> None:
    assert "alone:" not in shown(replace(report(FAILED), rerun=()))


def test_failures_come_before_all_else() -> None:
    text = shown(report(PASSED, MISSED, FAILED))
    table = text[text.index("Cases that did not pass") :]
    assert table.index("inflate-bad") < table.index("negotiate-some")
    assert "inflate-good" not in table


def test_what_does_not_apply_is_listed_by_reason() -> None:
    assert "not applicable, stats-vq is not offered: stats-none" in shown(report(ABSENT))


def test_what_did_not_run_is_one_line_and_a_column() -> None:
    text = shown(report(PASSED, LEFT, LEFT))
    assert "not run, the target is gone: it [ended]: 2 cases, from poison-late on" in text
    assert "Cases that did not pass" not in text
    assert summary(report(PASSED, LEFT)) == "2 cases: 1 pass, 1 not run"
    assert "not run" in text[text.index("By group") :]
    assert "not run" not in shown(report(PASSED, FAILED))


def test_all_cases_are_listed_if_asked() -> None:
    assert "inflate-good" not in shown(report(PASSED))
    assert "inflate-good" in shown(report(PASSED), verbose=True)


def test_a_known_deviation_shows_its_reason_and_no_transcript() -> None:
    text = shown(report(replace(FAILED, outcome=Outcome.KNOWN, reason="tracker 7")))
    assert "tracker 7" in text
    assert "-> inflate" not in text


def test_a_stale_entry_is_shown() -> None:
    text = shown(report(PASSED, stale={"inflate-good": "the case passes"}))
    assert "has inflate-good, and the case passes: take it out" in text


def test_the_summary_counts_what_there_is() -> None:
    assert summary(report(PASSED, PASSED, FAILED)) == "3 cases: 2 pass, 1 fail"
    assert summary(report()) == "0 cases: none"


def test_a_clause_has_its_document() -> None:
    assert clause_name("5.5.6") == "virtio 1.3, 5.5.6"
    assert clause_name("proposal bit 7") == "proposal bit 7"


def test_the_list_has_every_case_and_its_lessons() -> None:
    console = Console(file=io.StringIO(), width=118)
    print_cases(select(["inflate-huge-host-page", "inflate-one"]), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2 cases" in text
    assert "inflate-one" in text
    assert "lesson 5: a large host page fills up over several requests" in text
