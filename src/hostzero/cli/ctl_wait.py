# SPDX-License-Identifier: GPL-2.0-only
"""Waiting for a guest: until its balloon has the size that was asked for, or it has sent statistics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

from hostzero.errors import ControlError
from hostzero.render import data_size

if TYPE_CHECKING:
    from hostzero.vhost_user.control_client import ControlClient

POLL_EVERY: Final = 0.1
"""Seconds between two questions."""

LINE_EVERY: Final = 5.0
"""Seconds between two lines of progress in a log."""

Clock = Callable[[], float]
Sleep = Callable[[float], None]


class Lines:
    """Progress as a line every few seconds: for a log or a pipe."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        """Write to `stream`; the first line comes after the first few seconds."""
        self._stream = stream
        self._clock = clock
        self._written = clock()

    def moved(self, actual: int, target: int, note: str) -> None:
        """Write a line if the last one is old; sizes are in bytes."""
        if self._clock() - self._written >= LINE_EVERY:
            self._written = self._clock()
            self._stream.write(f"{describe(actual, target)}{note}\n")
            self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Bar:
    """Progress as a bar on a terminal, taken away at the end."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`, a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1)
        self._began: int | None = None

    def moved(self, actual: int, target: int, note: str) -> None:
        """Draw the way from where it began to the target."""
        self._began = actual if self._began is None else self._began
        way = abs(target - self._began)
        self._bar.update(
            self._task,
            total=max(way, 1),
            completed=max(way - abs(target - actual), 0),
            description=f"{describe(actual, target)}{note}",
        )
        self._bar.refresh()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def describe(actual: int, target: int) -> str:
    """Return in words how far the balloon is."""
    return f"balloon {data_size(actual)}, to be {data_size(target)}"


def open_progress(stream: TextIO | None = None) -> Lines | Bar:
    """Return a bar if `stream` (default: standard error) is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    return Bar(stream) if stream.isatty() else Lines(stream)


def wait_for_target(
    client: ControlClient,
    target: int,
    seconds: float,
    progress: Lines | Bar,
    *,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
) -> dict[str, Any]:
    """Return the state of the balloon once it has `target` bytes.

    Raises:
        ControlError: it has not after `seconds`, or somebody else asks for another size.
    """
    end = clock() + seconds
    while True:
        device: dict[str, Any] = client.request("status")["device"]
        actual = device["actual_bytes"]
        if device["target_bytes"] != target:
            raise ControlError(
                f"somebody else asked for a balloon of {data_size(device['target_bytes'])} meanwhile"
            )
        if device["live"] and actual == target:
            keys = ("memory_bytes", "target_bytes", "actual_bytes", "guest_bytes", "live")
            return {key: device[key] for key in keys}
        note = "" if device["live"] else "; no driver is running in the guest"
        if clock() >= end:
            raise ControlError(
                f"after {seconds:g} s: {describe(actual, target)}{note}; it goes on without us"
            )
        progress.moved(actual, target, note)
        sleep(POLL_EVERY)


def fetch_statistics(
    client: ControlClient,
    seconds: float,
    *,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
) -> dict[str, Any]:
    """Ask for statistics and return them, with ``fresh``: whether they came after the question."""
    end = clock() + seconds
    # That nothing was requested may mean that somebody else has just asked; one answer serves both.
    before = client.request("stats")["updates"]
    while True:
        status = client.request("status")
        device = status["device"]
        fresh = status["metrics"]["device"]["stats_updates"] > before
        hopeless = not device["live"] or "stats-vq" not in device["features_acked"]
        if fresh or hopeless or clock() >= end:
            return {"fresh": fresh, "statistics": status["statistics"]}
        sleep(POLL_EVERY)
