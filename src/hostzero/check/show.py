# SPDX-License-Identifier: GPL-2.0-only
"""What a run of the searches did, and what it found, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostzero.check.lifecycle import LIFECYCLE, ROW_IDS
from hostzero.check.progress import exercised
from hostzero.check.violation import KINDS, Violation
from hostzero.render import NONE, new_table, print_note, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from hostzero.check.recording import Recording, Step
    from hostzero.check.run import Report

MOST_STEPS: Final = 60
"""More steps than these are read in the recording, not on a terminal."""

_COUNT_WIDTH: Final = 29
# of a terminal: an id, and how often in the millions


def print_report(report: Report, console: Console) -> None:
    """Print what each search did, and then what was found, or else which rows were exercised."""
    if report.searches:
        print_searches(report, console)
        if report.ok:
            print_coverage(report.coverage, console)
        print_notes(report, console)
    for _, findings in report.searches:
        if findings.recording is not None:
            after = "" if findings.found_after is None else f" after {findings.found_after:,} steps"
            _line(console, f"{findings.search} found, with seed {report.options.seed}{after}:", style="bold")
            console.print()
            print_violation(findings.recording.violation, console)
            print_steps(findings.recording, console)
            if report.recording_file is not None:
                _line(console, f"run it again: hostzero check --replay {report.recording_file}")
    if report.ok:
        done = "interrupted; nothing" if report.interrupted else "nothing"
        _line(console, f"{done} found in {report.seconds:.0f} s; seed {report.options.seed}", style="bold")


def print_searches(report: Report, console: Console) -> None:
    """Print a line for each search: how much it did, how fast, how many states and rows it saw."""
    table = new_table("search", "seconds", "operations", "a second", "states", "a second", "rows")
    for _, findings in report.searches:
        states = findings.states
        table.add_row(
            findings.search,
            f"{findings.seconds:.1f}",
            f"{findings.operations:,}",
            _rate(findings.operations, findings.seconds),
            NONE if states is None else f"{states:,}",
            NONE if states is None else _rate(states, findings.seconds),
            f"{exercised(findings.rows)} of {len(ROW_IDS)}",
        )
    print_table(console, "Searches", table)


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f}" if seconds > 0 else NONE


def print_coverage(coverage: dict[str, int], console: Console) -> None:
    """Print how often each row of the lifecycle table was exercised, and which not at all."""
    seen = [(name, f"{count:,}") for name, count in coverage.items() if count]
    missed = [name for name, count in coverage.items() if not count]
    on_a_line = min(max(console.width // _COUNT_WIDTH, 1), max(len(seen), 1))
    table = new_table(*["row", "times"] * on_a_line, left=0)
    for at in range(0, len(table.columns), 2):
        table.columns[at].justify = "left"
    lines = -(-len(seen) // on_a_line)
    for line in range(lines):
        # Down the columns, so that the order of the table can be followed.
        cells = [cell for pair in seen[line::lines] for cell in pair]
        table.add_row(*cells)
    title = f"Rows of the lifecycle table (docs/safety.md): {len(seen)} of {len(LIFECYCLE)} exercised"
    if seen:
        print_table(console, title, table)
    else:
        _line(console, title, style="bold")
        console.print()
    if missed:
        _line(console, "not exercised")
        print_note(console, ", ".join(missed))
        console.print()


def print_notes(report: Report, console: Console) -> None:
    """Print what else the searches have to say."""
    noted = [(findings.search, note) for _, findings in report.searches for note in findings.notes]
    for name, note in noted:
        _line(console, f"{name}: {note}")
    if noted:
        console.print()


def print_violation(violation: Violation, console: Console) -> None:
    """Print a violation: the page, its list, the claim, the first wrong byte, the page's events."""
    first, *others = violation.lines()
    _line(console, first, style="bold")
    print_note(console, f"({KINDS[violation.kind]})")
    for line in others:
        _line(console, line)
    console.print()


def print_steps(recording: Recording, console: Console) -> None:
    """Print the steps that fail, the shortest sequence that was found."""
    steps = recording.steps
    _line(console, f"{_count(len(steps), 'step')} that fail{'s' if len(steps) == 1 else ''}:")
    if recording.setup:
        setup = ", ".join(f"{name} {json.dumps(value)}" for name, value in recording.setup.items())
        print_note(console, f"guest: {setup}")
    for line in step_lines(steps[:MOST_STEPS]):
        _line(console, line)
    if len(steps) > MOST_STEPS:
        _line(console, f"  ... and {len(steps) - MOST_STEPS} more, in the recording")
    console.print()


def step_lines(steps: Sequence[Step]) -> list[str]:
    """Return one line for each step, with its number."""
    width = len(str(len(steps)))
    return [
        f"  {number:{width}}  {step[0]} {' '.join(json.dumps(argument) for argument in step[1:])}".rstrip()
        for number, step in enumerate(steps, 1)
    ]


def print_replay(path: Path, recording: Recording, found: Violation | None, console: Console) -> None:
    """Print what came of running a recording again."""
    steps = _count(len(recording.steps), "step")
    _line(console, f"{path}: {steps} of the search {recording.search}")
    console.print()
    recorded = recording.violation
    if found is None:
        _line(console, f"does not fail any more; it was {recorded.kind}: {recorded.what}", style="bold")
        return
    print_steps(recording, console)
    print_violation(found, console)
    if (found.kind, found.what) == (recorded.kind, recorded.what):
        _line(console, "still fails, as it was recorded", style="bold")
    else:
        _line(console, f"fails in another way; it was {recorded.kind}: {recorded.what}", style="bold")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _line(console: Console, text: str, style: str = "") -> None:
    # As it is: an address is not to be coloured, nor a long line of events cut.
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
