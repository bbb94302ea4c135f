# SPDX-License-Identifier: GPL-2.0-only
"""A line for each search on a terminal, a line every few seconds elsewhere, and no thread."""

from __future__ import annotations

import io
import threading
from collections import Counter

import pytest

from hostzero.check.lifecycle import ROW_IDS
from hostzero.check.progress import LINE_EVERY, REDRAW_EVERY, Lines, Live, Silent, describe, open_progress
from hostzero.check.run import Watcher
from hostzero.check.search import Findings
from tests.check.played import Clock, recording_of

ROWS = Counter({"split": 3, "alloc": 0, "pcp": 1})


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def test_what_a_search_did_in_one_line() -> None:
    assert describe(2_000_000, None, ROWS, 10, 8.4) == (
        f"2,000,000 operations (200,000/s), 2 of {len(ROW_IDS)} rows, 8 s left"
    )
    assert describe(5, 1234, Counter(), 0, -1) == (
        f"5 operations, 1,234 states, 0 of {len(ROW_IDS)} rows, 0 s left"
    )


def test_a_log_gets_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock) as lines:
        lines.prepare("wire", "hostile bytes")
        lines.begin("wire", "hostile bytes", 18)
        for _ in range(4):
            clock.now += LINE_EVERY / 2
            lines.moved("wire", 1000, None, ROWS, "half way")
        lines.end(Findings("wire", 10, 2000, None, ROWS))
    assert stream.getvalue().splitlines() == [
        "wire: hostile bytes; preparing (compiled once for each version, which takes a minute or more)",
        "wire: searching for 18 s",
        f"wire: 1,000 operations (200/s), 2 of {len(ROW_IDS)} rows, 13 s left; half way",
        f"wire: 1,000 operations (100/s), 2 of {len(ROW_IDS)} rows, 8 s left; half way",
        f"wire: 2,000 operations (200/s), 2 of {len(ROW_IDS)} rows",
    ]


def test_a_log_says_that_something_was_found() -> None:
    stream = io.StringIO()
    Lines(stream, Clock()).end(Findings("wire", recording=recording_of("wire")))
    assert stream.getvalue().endswith("rows; FOUND SOMETHING\n")


def test_a_terminal_gets_a_line_for_each_search_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    stream, clock = Terminal(), Clock()
    threads = threading.active_count()
    with Live(stream, clock) as live:
        for name in ("allocator", "wire"):
            live.prepare(name, "some search")
            live.begin(name, "some search", 18)
            clock.now += 2
            live.moved(name, 1000, 50, ROWS, "[half way]")
            assert threading.active_count() == threads
            live.end(Findings(name, 2, 2000, 100, ROWS))
    shown = stream.getvalue()
    assert "allocator" in shown
    assert "1,000 operations (500/s), 50 states" in shown
    assert "[half way]" in shown
    assert "2,000 operations (1,000/s), 100 states" in shown


def test_a_narrow_terminal_gets_no_folded_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Live(stream, Clock()) as live:
        live.prepare("wire", "a title that is much longer than what a terminal of 40 columns holds")
        assert stream.getvalue().count("\n") == 0
    assert "much longer" not in stream.getvalue()


def test_a_terminal_is_not_drawn_more_often_than_can_be_read() -> None:
    stream, clock = Terminal(), Clock()
    with Live(stream, clock) as live:
        live.prepare("wire", "some search")
        live.begin("wire", "some search", 18)
        live.moved("wire", 111, None, ROWS)
        clock.now += REDRAW_EVERY
        live.moved("wire", 222, None, ROWS)
    assert "111 operations" not in stream.getvalue()
    assert "222 operations" in stream.getvalue()


def test_a_search_that_was_never_made_ready_may_end() -> None:
    with Live(Terminal(), Clock()) as live:
        live.end(Findings("wire"))


def test_who_is_told_depends_on_the_stream() -> None:
    assert isinstance(open_progress(io.StringIO()), Lines)
    assert isinstance(open_progress(Terminal()), Live)


def test_the_silent_one_says_nothing() -> None:
    silent: Watcher = Silent()
    silent.prepare("wire", "")
    silent.begin("wire", "", 1)
    silent.moved("wire", 1, None, ROWS)
    silent.end(Findings("wire"))
