# SPDX-License-Identifier: GPL-2.0-only
"""What became of one case, and of a run."""

from __future__ import annotations

import enum
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostzero.conform.case import Case
from hostzero.conform.judge import Level, Miss


class Outcome(enum.Enum):
    """How a case ended."""

    PASS = "pass"
    FAIL = "fail"
    SHOULD = "should"
    """Nothing that must hold was missed, and something that should."""
    NOT_APPLICABLE = "not applicable"
    KNOWN = "known deviation"
    """It failed or missed a should, and the list of known deviations has it."""
    NOT_RUN = "not run"
    """The run ended before it: the device was gone, or somebody ended the run."""


@dataclass(frozen=True)
class Result:
    """What became of one case.

    Attributes:
        case: the case.
        outcome: how it ended.
        misses: expectations that did not hold.
        reason: why it was not applicable or not run, or the reason of the known deviation.
        transcript: what was sent and what came back.
        seconds: how long it took.
    """

    case: Case
    outcome: Outcome
    misses: tuple[Miss, ...] = ()
    reason: str = ""
    transcript: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def level(self) -> Level | None:
        """The gravest level that was missed; None for none."""
        levels = {miss.level for miss in self.misses}
        return next((level for level in (Level.SAFETY, Level.MUST, Level.SHOULD) if level in levels), None)


@dataclass(frozen=True)
class Report:
    """What became of a run.

    Attributes:
        target: what was judged.
        facts: what identifies the device, by label.
        results: one for each case, in the suite's order.
        stale: ids in the list of known deviations that need it no more, each with the reason why.
        strict: whether a missed `should` counts as a failure.
        signal: the signal that ended the run before its last case; 0 for none.
        rerun: the command line of this run without its cases; empty if there is none.
    """

    target: str
    facts: Mapping[str, str]
    results: tuple[Result, ...]
    stale: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    signal: int = 0
    rerun: Sequence[str] = ()

    @property
    def ok(self) -> bool:
        """Whether all cases ran, nothing failed that counts, and no known deviation is out of date."""
        failing = {Outcome.FAIL, Outcome.NOT_RUN} | ({Outcome.SHOULD} if self.strict else set())
        return not self.stale and not any(result.outcome in failing for result in self.results)

    def count(self) -> Counter[Outcome]:
        """Return how many cases ended in each way."""
        return Counter(result.outcome for result in self.results)

    def alone(self, result: Result) -> str:
        """Return the command line that runs one case that missed something alone; empty if there is none."""
        if not result.misses or not self.rerun:
            return ""
        return shlex.join([*self.rerun, "--case", result.case.id])

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that JSON has words for."""
        return {
            "target": self.target,
            "facts": dict(self.facts),
            "ok": self.ok,
            "strict": self.strict,
            "counts": {outcome.value: self.count()[outcome] for outcome in Outcome},
            "stale": dict(self.stale),
            "cases": [_case_json(result) | {"alone": self.alone(result)} for result in self.results],
        }


def _case_json(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "id": case.id,
        "title": case.title,
        "clause": case.clause,
        "group": case.group,
        "lessons": list(case.lessons),
        "outcome": result.outcome.value,
        "reason": result.reason,
        "seconds": round(result.seconds, 4),
        "misses": [
            {"level": miss.level.value, "clause": miss.clause, "text": miss.text} for miss in result.misses
        ],
        "transcript": list(result.transcript),
    }
