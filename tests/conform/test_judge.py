# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.conform.judge import TRANSCRIPT_LINES, Failed, Judge, Level, Miss, Transcript


def test_what_must_hold_ends_the_case_with_its_clause() -> None:
    judge = Judge("5.5.6")
    judge.must(True, "holds")
    with pytest.raises(Failed) as failed:
        judge.must(False, "it did not come back")
    assert failed.value.miss == Miss(Level.MUST, "5.5.6", "it did not come back")
    with pytest.raises(Failed) as failed:
        judge.must(False, "length", "2.7.8.2")
    assert failed.value.miss.clause == "2.7.8.2"


def test_safety_is_another_level() -> None:
    judge = Judge("2.7.5")
    judge.safe(True, "fine")
    with pytest.raises(Failed) as failed:
        judge.safe(False, "the device went away")
    assert failed.value.miss.level is Level.SAFETY


def test_a_should_is_noted_once_and_the_case_goes_on() -> None:
    judge = Judge("2.2.2")
    assert judge.should(True, "fine")
    assert not judge.should(False, "refused")
    assert not judge.should(False, "refused")
    assert judge.misses == [Miss(Level.SHOULD, "2.2.2", "refused")]


def test_a_long_transcript_keeps_its_start_and_its_end() -> None:
    transcript = Transcript()
    for n in range(1000):
        transcript.sent(str(n))
    transcript.came("end")
    lines = transcript.as_lines()
    half = TRANSCRIPT_LINES // 2
    assert lines[:half] == [f"-> {n}" for n in range(half)]
    assert lines[half] == f".. {1001 - TRANSCRIPT_LINES} lines"
    assert lines[-1] == "<- end"
    assert len(lines) == TRANSCRIPT_LINES + 1


def test_a_short_transcript_is_whole() -> None:
    transcript = Transcript()
    transcript.sent("a")
    transcript.came("b")
    assert transcript.as_lines() == ["-> a", "<- b"]
