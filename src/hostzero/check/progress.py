# SPDX-License-Identifier: GPL-2.0-only
"""How far a run has come, on standard error, without a thread.

A line for each search, redrawn only when the search says that it has moved on: a thread that
redraws would take time from the search. Where standard error is no terminal, a line is written
every few seconds instead.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from hostzero.check.lifecycle import ROW_IDS
from hostzero.check.search import Findings

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY: Final = 5.0
"""Seconds between two lines in a log."""

REDRAW_EVERY: Final = 0.1
"""Seconds between two drawings of a terminal's lines: more cannot be read."""


_PREPARING: Final = "preparing (compiled once for each version, which takes a minute or more)"


def describe(
    operations: int, states: int | None, rows: Counter[str], seconds: float, left: float | None
) -> str:
    """Return one line on what a search has done in `seconds`."""
    rate = f" ({operations / seconds:,.0f}/s)" if seconds > 0 else ""
    parts = [f"{operations:,} operations{rate}"]
    if states is not None:
        parts.append(f"{states:,} states")
    parts.append(f"{exercised(rows)} of {len(ROW_IDS)} rows")
    if left is not None:
        parts.append(f"{max(left, 0):.0f} s left")
    return ", ".join(parts)


def exercised(rows: Counter[str]) -> int:
    """Return how many rows of the lifecycle table were exercised at all."""
    return sum(1 for count in rows.values() if count > 0)


class Silent:
    """Tells nobody: for callers from Python."""

    def prepare(self, name: str, title: str) -> None:
        """Ignore it."""

    def begin(self, name: str, title: str, seconds: float) -> None:
        """Ignore it."""

    def moved(
        self, name: str, operations: int, states: int | None, rows: Counter[str], note: str = ""
    ) -> None:
        """Ignore it."""

    def end(self, findings: Findings) -> None:
        """Ignore it."""


class _Timed:
    """Knows when the search under way began and how long it may take."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = 0.0
        self._seconds = 0.0

    def _start(self, seconds: float) -> None:
        self._began = self._clock()
        self._seconds = seconds

    def _describe(self, operations: int, states: int | None, rows: Counter[str], note: str) -> str:
        passed = self._clock() - self._began
        said = describe(operations, states, rows, passed, self._seconds - passed)
        return f"{said}; {note}" if note else said


class Lines(_Timed):
    """Writes a line when a search begins and ends, and every few seconds: for a log or a pipe."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.perf_counter) -> None:
        """Write to `stream`."""
        super().__init__(clock)
        self._stream = stream
        self._written = 0.0

    def prepare(self, name: str, title: str) -> None:
        """Say that the search is made ready: it may have to be compiled."""
        self._write(f"{name}: {title}; {_PREPARING}")

    def begin(self, name: str, title: str, seconds: float) -> None:
        """Say how long it may take."""
        self._start(seconds)
        self._write(f"{name}: searching for {seconds:.0f} s")
        self._written = self._clock()

    def moved(
        self, name: str, operations: int, states: int | None, rows: Counter[str], note: str = ""
    ) -> None:
        """Write a line if the last one is old."""
        if self._clock() - self._written >= LINE_EVERY:
            self._write(f"{name}: {self._describe(operations, states, rows, note)}")
            self._written = self._clock()

    def end(self, findings: Findings) -> None:
        """Say what was done."""
        said = describe(findings.operations, findings.states, findings.rows, findings.seconds, None)
        found = "" if findings.recording is None else "; FOUND SOMETHING"
        self._write(f"{findings.search}: {said}{found}")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Live(_Timed):
    """Keeps a line for each search on a terminal, and takes them away at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.perf_counter) -> None:
        """Draw on `stream`, a terminal."""
        from rich.console import Console
        from rich.progress import Progress as RichProgress
        from rich.progress import TextColumn
        from rich.table import Column

        super().__init__(clock)
        self._lines = RichProgress(
            TextColumn("{task.fields[search]}", style="bold"),
            # A line that folds would make the others jump.
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._drawn = 0.0
        self._tasks: dict[str, TaskID] = {}

    def prepare(self, name: str, title: str) -> None:
        """Add the search's line."""
        if name not in self._tasks:
            self._tasks[name] = self._lines.add_task("", search=name)
        self._draw(name, f"{_PREPARING}: {title}")

    def begin(self, name: str, title: str, seconds: float) -> None:
        """Say that it searches."""
        self._start(seconds)
        self._draw(name, f"searching for {seconds:.0f} s")

    def moved(
        self, name: str, operations: int, states: int | None, rows: Counter[str], note: str = ""
    ) -> None:
        """Draw the line anew, unless that was done just now."""
        if self._clock() - self._drawn >= REDRAW_EVERY:
            self._draw(name, self._describe(operations, states, rows, note))

    def end(self, findings: Findings) -> None:
        """Leave the line with what was done."""
        if findings.search in self._tasks:
            said = describe(findings.operations, findings.states, findings.rows, findings.seconds, None)
            self._draw(findings.search, f"{said} in {findings.seconds:.0f} s")

    def _draw(self, name: str, said: str) -> None:
        self._lines.update(self._tasks[name], description=said)
        self._lines.refresh()
        self._drawn = self._clock()

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.stop()


def open_progress(stream: TextIO | None = None) -> Lines | Live:
    """Return lines on a terminal if `stream` (default: standard error) is one, else a log's lines."""
    stream = sys.stderr if stream is None else stream
    return Live(stream) if stream.isatty() else Lines(stream)
