# SPDX-License-Identifier: GPL-2.0-only
"""How far fuzzing has come, and what came of it, for a reader."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hostzero.conform.fuzz.run import FuzzReport
from hostzero.render import data_size, new_table, print_note, print_table

LINE_EVERY: Final = 5.0
"""Seconds between two lines in a log."""


@contextmanager
def open_progress(
    seconds: float, stream: TextIO | None = None
) -> Iterator[Callable[[float, int, int], None]]:
    """Yield what hears seconds, connections and steps: a bar on a terminal, else lines now and then."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _lines(stream)
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=seconds)

        def draw(spent: float, episodes: int, steps: int) -> None:
            bar.update(task, completed=spent, description=f"{episodes:,} connections, {steps:,} steps")

        yield draw


def _lines(stream: TextIO) -> Callable[[float, int, int], None]:
    told = 0.0

    def tell(spent: float, episodes: int, steps: int) -> None:
        nonlocal told
        if spent - told >= LINE_EVERY:
            told = spent
            print(f"{spent:.0f} s: {episodes:,} connections, {steps:,} steps", file=stream, flush=True)

    return tell


def print_report(report: FuzzReport, console: Console, rerun: Sequence[str]) -> None:
    """Print what was sent, what the backend used and what was found, if anything.

    Args:
        report: what came of it.
        console: where to print.
        rerun: the command line without seed, time and episode.
    """
    for title, counts in (("sent", report.done), ("came back", report.answers)):
        table = new_table(title, "times")
        for kind, count in sorted(counts.items()):
            table.add_row(escape(kind), f"{count:,}")  # some kinds are words of the backend's
        print_table(console, f"What {'was ' if title == 'sent' else ''}{title}", table)
    if report.figures:
        used = ", ".join(_figure(name, value) for name, value in report.figures.items())
        console.print(f"the backend's process: {used}", highlight=False)
    for note in report.notes:
        print_note(console, note)
    steps = sum(report.done.values())
    line = f"{report.episodes:,} connections, {steps:,} steps in {report.seconds:.0f} s; seed {report.seed}"
    if report.finding is None:
        console.print(f"nothing found: {line}", highlight=False, soft_wrap=True)
        return
    found = report.finding
    console.print(f"{found.kind}: {found.text}", style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"in connection {found.episode} at step {found.step} ({line}); before it, newest last:",
        highlight=False,
        soft_wrap=True,
    )
    for step in found.last:
        console.print(f"  {step}", highlight=False, markup=False, soft_wrap=True)
    again = shlex.join([*rerun, "--seed", str(found.seed), "--episode", str(found.episode)])
    console.print(f"that connection alone: {again}", highlight=False, markup=False, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    text = data_size(value) if name.endswith("bytes") else f"{value:g}"
    return f"{name.removesuffix('_bytes').replace('_', ' ')} {text}"
