# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io
import re

from hostzero.vm.progress import Bar, Lines, Progress, open_progress


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def drive(progress: Progress) -> None:
    progress.stage("fetching")
    progress.at(50)
    progress.stage("unpacking")


def test_a_pipe_gets_a_line_per_stage() -> None:
    stream = io.StringIO()
    with open_progress(stream) as progress:
        assert isinstance(progress, Lines)
        drive(progress)
    assert stream.getvalue() == "fetching\nunpacking\n"


def test_a_terminal_keeps_every_stage() -> None:
    stream = Terminal()
    with open_progress(stream) as progress:
        assert isinstance(progress, Bar)
        drive(progress)
    # A line of its own each: what moves has a bar behind its text, and is wiped.
    kept = re.findall(r"(?<=\x1b\[2K)[a-z]+(?=\n)", stream.getvalue())
    assert kept == ["fetching", "unpacking"]
