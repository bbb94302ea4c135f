# SPDX-License-Identifier: GPL-2.0-only
"""How far preparing, booting or comparing has come, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

PER_CENT: Final = 100.0


class Progress(Protocol):
    """What whoever works tells whoever waits."""

    def stage(self, text: str) -> None:
        """A stage begins; `text` says what is being done."""

    def at(self, per_cent: float) -> None:
        """The stage is done to `per_cent` of 100."""


class Silent:
    """Tells nobody: for tests."""

    def stage(self, text: str) -> None:
        """Ignore it."""

    def at(self, per_cent: float) -> None:
        """Ignore it."""


class Lines:
    """One line per stage: for a log file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self._stream = stream

    def stage(self, text: str) -> None:
        """Write the line."""
        print(text, file=self._stream, flush=True)

    def at(self, per_cent: float) -> None:
        """Write nothing: a log does not need it."""


class Bar:
    """A line that moves, on a terminal; finished stages stay above it."""

    def __init__(self, bar: RichProgress) -> None:
        """Draw with `bar`, which is running."""
        self._bar = bar
        self._text = ""
        self._task = bar.add_task("", total=None, visible=False)

    def stage(self, text: str) -> None:
        """Print the stage before, and begin with this one."""
        self.finish()
        self._text = text
        self._bar.reset(self._task, total=None, description=text, visible=True)

    def at(self, per_cent: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, total=PER_CENT, completed=per_cent)

    def finish(self) -> None:
        """Print the stage that was under way, if any."""
        if self._text:
            self._bar.console.print(self._text, highlight=False)
        self._text = ""


@contextmanager
def open_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield a progress on standard error, or on `stream`: a bar on a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield Lines(stream)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(file=stream), transient=True) as rich_progress:
        bar = Bar(rich_progress)
        yield bar
        bar.finish()
