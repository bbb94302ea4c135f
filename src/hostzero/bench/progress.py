# SPDX-License-Identifier: GPL-2.0-only
"""Progress of a run, on standard error, without a thread.

A progress bar that redraws itself from a thread would spend CPU time of this very
process, inside the stretches that are measured. So it is redrawn only when the run
says that it has moved on, which is between stretches. Where standard error is no
terminal, each scenario is one line.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self, TextIO, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What a run tells whoever is waiting."""

    def scenario(self, name: str, steps: int) -> None:
        """A scenario begins; it has `steps` steps."""

    def step(self, what: str) -> None:
        """One step is done; `what` names it, as in "baseline, populate+touch, 3 of 10"."""


class Silent:
    """Tells nobody: for tests and for callers from Python."""

    def scenario(self, name: str, steps: int) -> None:
        """Ignore it."""

    def step(self, what: str) -> None:
        """Ignore it."""


class Lines:
    """One line per scenario: for a log file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self._stream = stream

    def scenario(self, name: str, steps: int) -> None:
        """Write the line."""
        print(f"{name}: {steps} steps", file=self._stream, flush=True)

    def step(self, what: str) -> None:
        """Write nothing: a log does not need every step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Bar:
    """A bar per scenario on a terminal, redrawn at each step and taken away at the end."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`, a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.fields[scenario]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", scenario="", visible=False, total=1)

    def scenario(self, name: str, steps: int) -> None:
        """Start the bar again for this scenario."""
        self._bar.reset(self._task, total=steps, visible=True, description="", scenario=name)
        self._bar.refresh()

    def step(self, what: str) -> None:
        """Move the bar by one."""
        self._bar.update(self._task, advance=1, description=what)
        self._bar.refresh()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def open_progress(stream: TextIO | None = None) -> AbstractContextManager[Progress]:
    """Return a bar if `stream` (default: standard error) is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    return Bar(stream) if stream.isatty() else Lines(stream)
