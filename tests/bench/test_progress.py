# SPDX-License-Identifier: GPL-2.0-only
"""A bar on a terminal, lines elsewhere, and no thread in either."""

from __future__ import annotations

import io
import threading

from hostzero.bench.progress import Bar, Lines, Progress, Silent, open_progress


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def drive(progress: Progress) -> None:
    progress.scenario("thp", 2)
    progress.step("baseline, populate, 1 of 1")
    progress.step("optimized, populate, 1 of 1")


def test_a_pipe_gets_one_line_per_scenario() -> None:
    stream = io.StringIO()
    with open_progress(stream) as progress:
        assert isinstance(progress, Lines)
        drive(progress)
        progress.scenario("4k", 5)
    assert stream.getvalue() == "thp: 2 steps\n4k: 5 steps\n"


def test_a_terminal_gets_a_bar_that_moves_without_a_thread() -> None:
    """A redrawing thread would spend CPU time inside the measured stretches."""
    stream = Terminal()
    threads = threading.active_count()
    with open_progress(stream) as progress:
        assert isinstance(progress, Bar)
        drive(progress)
        assert threading.active_count() == threads
    assert "thp" in stream.getvalue()
    assert "2/2" in stream.getvalue()


def test_the_silent_one_says_nothing() -> None:
    progress = Silent()
    assert isinstance(progress, Progress)
    drive(progress)
