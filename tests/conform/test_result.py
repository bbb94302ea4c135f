# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import json

from hostzero.conform.judge import Level
from hostzero.conform.result import Outcome
from hostzero.document import to_json
from tests.conform.results import ABSENT, FAILED, LEFT, MISSED, PASSED, report


def test_a_failure_is_not_ok_and_a_missed_should_only_if_strict() -> None:
    assert report(PASSED, ABSENT, MISSED).ok
    assert not report(PASSED, MISSED, strict=True).ok
    assert not report(PASSED, FAILED).ok


def test_a_run_that_ended_early_is_not_ok() -> None:
    assert not report(PASSED, LEFT).ok


def test_a_list_that_is_out_of_date_is_not_ok() -> None:
    assert not report(PASSED, stale={"inflate-good": "the case passes"}).ok


def test_the_gravest_level_counts() -> None:
    assert FAILED.level is Level.MUST
    assert MISSED.level is Level.SHOULD
    assert PASSED.level is None


def test_the_document_has_everything() -> None:
    document = json.loads(to_json(report(PASSED, FAILED, ABSENT).to_json()))
    assert document["target"] == "unix:/run/b.sock"
    assert document["facts"] == {"device": "some device"}
    assert document["ok"] is False
    assert document["counts"] == {
        outcome.value: count for outcome, count in zip(Outcome, (1, 1, 0, 1, 0, 0), strict=True)
    }
    passed, failed, absent = document["cases"]
    assert passed["misses"] == []
    assert failed["clause"] == "5.5.6"
    assert failed["misses"][0] == {
        "level": "must",
        "clause": "2.7.8.2",
        "text": "the used length is [4], not 0",
    }
    assert failed["transcript"] == ["-> inflate", "<- used length 4"]
    assert failed["alone"] == "hostzero conform 'unix:/run/my socket' --case inflate-bad"
    assert passed["alone"] == absent["alone"] == ""
    assert absent["reason"] == "stats-vq is not offered"
