# SPDX-License-Identifier: GPL-2.0-only
"""How far a run has come, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hostzero.conform.case import Case
from hostzero.conform.result import Outcome, Result
from hostzero.conform.run import Progress

LINE_EVERY: Final = 5.0
"""Seconds between two lines in a log."""


@contextmanager
def open_progress(total: int, stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield what to tell of `total` cases; what is drawn is gone afterwards."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _Lines(total, stream)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        yield _Bar(bar, total)


class _Bar:
    def __init__(self, bar: Bar, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total, failed=0)
        self._failed = 0

    def began(self, case: Case) -> None:
        self._bar.update(self._task, description=case.id)

    def ended(self, result: Result) -> None:
        self._failed += result.outcome is Outcome.FAIL
        self._bar.update(self._task, advance=1, failed=self._failed)


class _Lines:
    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._done = self._failed = 0
        self._next = time.monotonic() + LINE_EVERY

    def began(self, case: Case) -> None:
        """Say nothing: a line comes when a case has ended."""

    def ended(self, result: Result) -> None:
        self._done += 1
        self._failed += result.outcome is Outcome.FAIL
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY
            print(
                f"{self._done} of {self._total} cases, {self._failed} failed", file=self._stream, flush=True
            )
