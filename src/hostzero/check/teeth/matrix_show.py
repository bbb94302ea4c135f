# SPDX-License-Identifier: GPL-2.0-only
"""The matrix of mutants and searches as a table, as JSON and as a page of the documentation."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hostzero.check.teeth.matrix import AS_IT_IS, Matrix, MatrixOptions
from hostzero.check.teeth.mutants import KINDS
from hostzero.check.teeth.outcome import Outcome

FORMAT: Final = "hostzero-mutants"
VERSION: Final = 1

COLUMNS: Final = ("Patch", "Mutant", "Kind", "Outcome", "Steps", "Seconds", "Length", "Found")


def command_of(options: MatrixOptions) -> str:
    """Return the command that makes such a matrix."""
    words = ["hostzero", "check", "--mutants"]
    for name, values in (("patch", options.patches), ("name", options.names), ("kind", options.kinds)):
        for value in values:
            words += [f"--{name}", str(value)]
    if options.variant != AS_IT_IS:
        words.append(f"--{options.variant.name}")
    words += ["--seconds", f"{options.seconds:g}", "--again", f"{options.again:g}"]
    words += ["--seed", str(options.seed)]
    return shlex.join(words)


def outcome_word(outcome: Outcome) -> str:
    """Return in a few words what became of a mutant."""
    how = ", compiled" if outcome.compiled else ""
    if outcome.verdict != "killed":
        return (outcome.verdict if outcome.good else outcome.verdict.upper()) + how
    first = outcome.findings[0]
    others = ", ".join(finding.search for finding in outcome.findings[1:])
    said = f"{first.search}: {first.kind}" + (f" (and {others})" if others else "") + how
    return f"{said}, NOT LOST" if outcome.by_another_kind else said


def cells(outcome: Outcome) -> tuple[str, ...]:
    """Return a row of the table, in the order of `COLUMNS`."""
    mutant = outcome.mutant
    who = ("", "unchanged source", "") if mutant is None else (str(mutant.patch), mutant.name, mutant.kind)
    if not outcome.findings:
        steps = str(outcome.operations) if outcome.operations else "–"
        seconds = outcome.searched or outcome.seconds
        return (*who, outcome_word(outcome), steps, f"{seconds:.1f}", "–", outcome.detail)
    first = outcome.findings[0]
    steps = "–" if first.steps is None else str(first.steps)
    return (*who, outcome_word(outcome), steps, f"{first.seconds:.1f}", str(first.length), first.what)


def progress_line(number: int, total: int, outcome: Outcome) -> str:
    """Return what there is to say as soon as an outcome is known."""
    patch, name, _, word, *_, found = cells(outcome)
    said = f"{number:3}/{total}  {outcome.seconds:5.1f} s  {patch:>2}  {name}: {word}"
    return f"{said}: {found}" if found and not outcome.findings else said


def summary(matrix: Matrix) -> list[str]:
    """Return the counts, and what is not as it must be, a line each."""
    if not matrix.unchanged.good:
        return [f"the unchanged source: {outcome_word(matrix.unchanged)}: no mutant was tried"]
    lines = []
    for kind in KINDS:
        of_kind = [outcome for outcome in matrix.outcomes if outcome.mutant and outcome.mutant.kind == kind]
        if not of_kind:
            continue
        killed = sum(outcome.verdict == "killed" for outcome in of_kind)
        line = f"{kind}: {killed} of {len(of_kind)} killed"
        if kind == "loses":
            as_lost = sum(outcome.lost_found for outcome in of_kind)
            line += f", {as_lost} because an optimisation was lost"
        second = sum(outcome.compiled and outcome.verdict == "killed" for outcome in of_kind)
        line += f", {second} of them with the compiler on" if second else ""
        for verdict in ("survived", "timed out", "crashed"):
            number = sum(outcome.verdict == verdict for outcome in of_kind)
            line += f", {number} {verdict}" if number else ""
        lines.append(line)
    return lines


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print the table, survivors first, and the counts."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for outcome in (*matrix.outcomes, matrix.unchanged):
        table.add_row(*(escape(cell) for cell in cells(outcome)))
    console.print(table, highlight=False)
    for line in summary(matrix):
        console.print(line, highlight=False, markup=False)


def to_json(matrix: Matrix) -> dict[str, Any]:
    """Return everything that is known as JSON values."""
    options = matrix.options
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": command_of(options),
        "seconds": options.seconds,
        "again": options.again,
        "seed": options.seed,
        "variant": options.variant.name,
        "python": platform.python_version(),
        "ok": matrix.ok,
        "unchanged": matrix.unchanged.to_json(),
        "mutants": [outcome.to_json() for outcome in matrix.outcomes],
    }


def to_markdown(matrix: Matrix, date: str) -> str:
    """Return the page of a matrix that was made on `date`."""
    return "\n".join(_lines(matrix, date)) + "\n"


def _lines(matrix: Matrix, date: str) -> Iterator[str]:
    options, unchanged = matrix.options, matrix.unchanged
    yield "# Mutants, and the searches that kill them"
    yield ""
    yield (
        "Each mutant is one small change to a copy of hostzero's source ([mutants/](../mutants/README.md)). "
        "`hostzero check` searches each copy in a process of its own, without knowing what was changed."
    )
    yield ""
    yield "```console"
    yield f"$ {command_of(options)} --markdown FILE"
    yield "```"
    yield ""
    second = (
        "What must be found and was not was searched once more with the compiler on, "
        f"for {options.again:g} s. "
        if options.again
        else ""
    )
    yield (
        f"Made {date} with Python {platform.python_version()}, one run for each mutant, the compiler off: "
        f"compiling each would take 100 s. {second}"
        f"The unchanged source survived the same command with {unchanged.operations} steps "
        f"in {unchanged.searched:.0f} s."
    )
    yield ""
    for line in summary(matrix):
        yield f"- {line}"
    yield ""
    yield (
        "*Steps* were done before it was found, *seconds* include making the counterexample short, and "
        "*length* is how many steps of it were left. What survived is on top. A process that ends without "
        "a report (*crashed*, *timed out*) proves nothing."
    )
    yield ""
    yield "| " + " | ".join(column.lower() for column in COLUMNS) + " |"
    yield "|--:|---|---|---|--:|--:|--:|---|"
    for outcome in matrix.outcomes:
        yield "| " + " | ".join(_cell(cell) for cell in cells(outcome)) + " |"


def _cell(text: str) -> str:
    # A bar ends a cell, and an angle bracket begins a tag.
    for mark, shown in (("|", r"\|"), ("<", "&lt;"), ("*", r"\*"), ("__", r"\_\_")):
        text = text.replace(mark, shown)
    return " ".join(text.split())
