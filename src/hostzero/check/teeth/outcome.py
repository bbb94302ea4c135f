# SPDX-License-Identifier: GPL-2.0-only
"""What became of a mutant: read from the report of the `hostzero check` that searched it.

A mutant is killed if a search found something in it. A process that ends in any other way than
with a report has not searched: it proves nothing, for the mutant or against it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from hostzero.check.teeth.child import Ending
from hostzero.check.teeth.mutants import Mutant

REPORT_FORMAT: Final = "hostzero-check-report"
REPORT_VERSION: Final = 1

Verdict = Literal["survived", "timed out", "crashed", "killed"]

VERDICTS: Final[tuple[Verdict, ...]] = ("survived", "timed out", "crashed", "killed")
"""In the order in which a reader wants to see them."""

_ENOUGH_OF_A_MESSAGE: Final = 300


@dataclass(frozen=True)
class Finding:
    """What one search found.

    Attributes:
        search: its name.
        kind: of the violation.
        what: is wrong, in one sentence.
        steps: done when it was found, before shrinking; None if the search does not say.
        seconds: the search took, shrinking included.
        length: of the counterexample, in steps.
    """

    search: str
    kind: str
    what: str
    steps: int | None
    seconds: float
    length: int


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant, or of the unchanged source.

    Attributes:
        mutant: which; None for the unchanged source.
        verdict: one of `VERDICTS`.
        findings: what the searches found; empty unless it was killed.
        operations: steps done and checked by all searches.
        searched: seconds that the searches took.
        seconds: from the start of the process to its end.
        detail: why there is no report, if there is none.
        compiled: whether it was searched a second time, with the compiler on.
    """

    mutant: Mutant | None
    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    operations: int = 0
    searched: float = 0.0
    seconds: float = 0.0
    detail: str = ""
    compiled: bool = False

    @property
    def lost_found(self) -> bool:
        """Whether a search found that an optimisation is lost."""
        return any(finding.kind == "lost" for finding in self.findings)

    @property
    def by_another_kind(self) -> bool:
        """Whether a mutant that only loses an optimisation was killed, but not for that."""
        return (
            self.mutant is not None
            and self.mutant.kind == "loses"
            and bool(self.findings)
            and not self.lost_found
        )

    @property
    def good(self) -> bool:
        """Whether the search did what it must with such a mutant.

        One that corrupts must be killed, one that loses an optimisation be killed as that. What
        else misbehaves may be out of the searches' sight, and the unchanged source must survive.
        """
        if self.mutant is None:
            return self.verdict == "survived"
        if self.mutant.kind == "corrupts":
            return self.verdict == "killed"
        return self.mutant.kind != "loses" or self.lost_found

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        mutant = None if self.mutant is None else asdict(self.mutant)
        return asdict(self) | {"mutant": mutant, "good": self.good}


def outcome_of(mutant: Mutant | None, ending: Ending) -> Outcome:
    """Return what a process that searched a mutant shows of it."""
    if ending.status is None:
        return Outcome(mutant, "timed out", seconds=ending.seconds, detail=_last_line(ending.err))
    try:
        return _read(mutant, ending, json.loads(ending.out))
    except (KeyError, TypeError, ValueError) as error:
        said = _last_line(ending.err) or f"no report: {error!r}"
        detail = f"exit status {ending.status}: {said}"
        return Outcome(mutant, "crashed", seconds=ending.seconds, detail=detail[:_ENOUGH_OF_A_MESSAGE])


def _read(mutant: Mutant | None, ending: Ending, report: Any) -> Outcome:
    if report["format"] != REPORT_FORMAT or report["version"] != REPORT_VERSION:
        raise ValueError(f"a report of format {report['format']!r}, version {report['version']!r}")
    findings = tuple(_finding(search) for search in report["searches"] if search["recording"] is not None)
    # A report that contradicts itself or the exit status is none.
    if bool(report["ok"]) == bool(findings) or ending.status != (1 if findings else 0):
        raise ValueError(f"the report says ok: {report['ok']!r} with {len(findings)} findings")
    return Outcome(
        mutant,
        "killed" if findings else "survived",
        findings,
        operations=sum(int(search["operations"]) for search in report["searches"]),
        searched=sum(float(search["seconds"]) for search in report["searches"]),
        seconds=ending.seconds,
    )


def _finding(search: dict[str, Any]) -> Finding:
    recording = search["recording"]
    violation = recording["violation"]
    steps = search["found_after"]
    return Finding(
        search=str(search["name"]),
        kind=str(violation["kind"]),
        what=str(violation["what"]),
        steps=None if steps is None else int(steps),
        seconds=float(search["seconds"]),
        length=len(recording["steps"]),
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:_ENOUGH_OF_A_MESSAGE] if lines else ""
