# SPDX-License-Identifier: GPL-2.0-only
"""A report for people: what failed first, then the groups, then the count."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hostzero.conform.case import LESSONS, Case
from hostzero.conform.result import Outcome, Report, Result
from hostzero.render import new_table, print_note, print_table

_STYLE = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.SHOULD: "yellow",
    Outcome.NOT_APPLICABLE: "dim",
    Outcome.KNOWN: "magenta",
    Outcome.NOT_RUN: "bold red",
}
_ORDER = (Outcome.FAIL, Outcome.SHOULD, Outcome.KNOWN, Outcome.PASS)


def print_report(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print a report.

    Args:
        report: what became of a run.
        console: where to.
        verbose: also list the cases that passed.
    """
    facts = ", ".join(f"{label} {value}" for label, value in report.facts.items())
    console.print(f"{report.target}: {facts}", highlight=False, markup=False)
    console.print()
    for result in report.results:
        if result.outcome in {Outcome.FAIL, Outcome.SHOULD}:
            print_finding(result, console, report.alone(result))
    quiet = {Outcome.NOT_APPLICABLE, Outcome.NOT_RUN} | (set() if verbose else {Outcome.PASS})
    shown = [result for result in report.results if result.outcome not in quiet]
    if shown:
        table = new_table("case", "clause", "outcome", "", left=4)
        for result in sorted(shown, key=lambda each: (_ORDER.index(each.outcome), each.case.group)):
            style = _STYLE[result.outcome]
            table.add_row(
                result.case.id,
                result.case.clause,
                f"[{style}]{result.outcome.value}[/]",
                escape(result.reason or (result.misses[0].text if result.misses else result.case.title)),
            )
        _wrap_last(table)
        print_table(console, "Cases" if verbose else "Cases that did not pass", table)
    print_groups(report, console)
    print_not_applicable(report, console)
    print_not_run(report, console)
    for name, why in report.stale.items():
        print_note(console, f"the list of known deviations has {name}, and {why}: take it out")
    console.print(summary(report), highlight=False)


def print_finding(result: Result, console: Console, alone: str) -> None:
    """Print one case that failed: the clause, what was seen, what was sent and came back.

    `alone` is the command line that runs it alone; empty for none.
    """
    case = result.case
    style = _STYLE[result.outcome]
    console.print(
        f"[{style}]{result.outcome.value}[/] [bold]{case.id}[/]: {escape(case.title)}", highlight=False
    )
    for miss in result.misses:
        print_note(
            console,
            f"[{style}]{miss.level.value}[/], {escape(clause_name(miss.clause))}: {escape(miss.text)}",
        )
    for line in result.transcript:
        print_note(console, f"[dim]{escape(line)}[/]")
    if alone:
        print_note(console, escape(f"alone: {alone}"))
    console.print()


def print_groups(report: Report, console: Console) -> None:
    """Print how many cases of each group ended in which way."""
    groups = list(dict.fromkeys(result.case.group for result in report.results))
    # Nearly every run is whole; its table needs no column that says so.
    whole = not any(result.outcome is Outcome.NOT_RUN for result in report.results)
    outcomes = [outcome for outcome in Outcome if not (whole and outcome is Outcome.NOT_RUN)]
    table = new_table("group", *[outcome.value for outcome in outcomes])
    for group in groups:
        ended = [result.outcome for result in report.results if result.case.group == group]
        table.add_row(group, *[str(ended.count(outcome) or "") for outcome in outcomes])
    print_table(console, "By group", table)


def print_not_applicable(report: Report, console: Console) -> None:
    """Print which cases said nothing about this device, by reason."""
    reasons: dict[str, list[str]] = {}
    for result in report.results:
        if result.outcome is Outcome.NOT_APPLICABLE:
            reasons.setdefault(result.reason, []).append(result.case.id)
    for reason, ids in reasons.items():
        print_note(console, escape(f"not applicable, {reason}: {', '.join(ids)}"))
    if reasons:
        console.print()


def print_not_run(report: Report, console: Console) -> None:
    """Print from which case on nothing ran, and why; it is always the rest of the run."""
    left = [result for result in report.results if result.outcome is Outcome.NOT_RUN]
    if left:
        print_note(
            console, escape(f"not run, {left[0].reason}: {len(left)} cases, from {left[0].case.id} on")
        )
        console.print()


def print_cases(cases: Sequence[Case], console: Console) -> None:
    """Print what cases there are."""
    table = new_table("case", "clause", "lesson", "asks that", left=4)
    for case in cases:
        table.add_row(case.id, case.clause, ", ".join(map(str, case.lessons)), escape(case.title))
    _wrap_last(table)
    print_table(console, f"{len(cases)} cases", table)
    for number in sorted({number for case in cases for number in case.lessons}):
        print_note(console, f"lesson {number}: {LESSONS[number]}")


def clause_name(clause: str) -> str:
    """Return a clause with the document that it is in."""
    return f"virtio 1.3, {clause}" if clause[:1].isdigit() else clause


def summary(report: Report) -> str:
    """Return the count as one line."""
    counts = report.count()
    parts = [f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome]]
    return f"{len(report.results)} cases: {', '.join(parts) or 'none'}"


def _wrap_last(table: Table) -> None:
    for column in table.columns:
        column.vertical = "top"
    table.columns[-1].no_wrap = False
