# SPDX-License-Identifier: GPL-2.0-only
"""Results to report, made by hand."""

from __future__ import annotations

from hostzero.conform.case import Case
from hostzero.conform.judge import Level, Miss
from hostzero.conform.result import Outcome, Report, Result

MUST = Miss(Level.MUST, "2.7.8.2", "the used length is [4], not 0")
SHOULD = Miss(Level.SHOULD, "2.2.2", "a subset is refused")


def case(case_id: str, group: str = "inflate") -> Case:
    return Case(
        case_id,
        f"{case_id} does what it has to",
        "5.5.6",
        f"hostzero.conform.cases.{group}",
        lambda rig: None,
    )


PASSED = Result(case("inflate-good"), Outcome.PASS, seconds=0.5)
FAILED = Result(
    case("inflate-bad"), Outcome.FAIL, (MUST, SHOULD), transcript=("-> inflate", "<- used length 4")
)
MISSED = Result(case("negotiate-some", "negotiation"), Outcome.SHOULD, (SHOULD,))
ABSENT = Result(case("stats-none", "statistics"), Outcome.NOT_APPLICABLE, reason="stats-vq is not offered")

LEFT = Result(case("poison-late", "poison"), Outcome.NOT_RUN, reason="the target is gone: it [ended]")


RERUN = ("hostzero", "conform", "unix:/run/my socket")


def report(*results: Result, stale: dict[str, str] | None = None, strict: bool = False) -> Report:
    facts = {"device": "some device"}
    return Report("unix:/run/b.sock", facts, results, stale or {}, strict, rerun=RERUN)
