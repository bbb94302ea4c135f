# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from hostzero.conform.fuzz.finding import Finding, Kind
from hostzero.conform.fuzz.run import FuzzReport
from hostzero.conform.fuzz.show import LINE_EVERY, open_progress, print_report

RERUN = ["hostzero", "fuzz", "/run/my [red] socket", "--control", "ctl"]
REPORT = FuzzReport(
    "/run/my [red] socket",
    seed=7,
    seconds=61.4,
    episodes=1234,
    done={"end: closed": 1000, "driver": 2345},
    answers={"zero": 5, "control: [/odd]": 3},
    figures={"descriptors": 12, "anonymous_bytes": 3 << 20, "cpu_seconds": 1.25, "log_bytes": 100},
    notes=["no --control: not checked that status is answered"],
)
TOTAL = "1,234 connections, 3,345 steps in 61 s; seed 7"
FOUND = Finding(
    Kind.CONTENT,
    "page 0x7 changed [in part]: " + "and a long line is not folded, " * 5,
    seed=7,
    episode=12,
    step=40,
    last=("driver: starts [red]", "end: closed: nothing"),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(report: FuzzReport) -> list[str]:
    console = Console(file=io.StringIO(), width=118)
    print_report(report, console, RERUN)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


# ---------------------------------------------------------------------------- the report


def test_what_was_sent_and_what_came_back_is_counted_by_kind() -> None:
    lines = shown(REPORT)
    rows = [line.split() for line in lines]
    assert rows.index(["What", "was", "sent"]) < rows.index(["driver", "2,345"])
    assert rows.index(["driver", "2,345"]) < rows.index(["end:", "closed", "1,000"])
    assert rows.index(["end:", "closed", "1,000"]) < rows.index(["What", "came", "back"])
    assert rows.index(["What", "came", "back"]) < rows.index(["zero", "5"])


def test_what_the_backend_says_is_no_markup() -> None:
    assert ["control:", "[/odd]", "3"] in [line.split() for line in shown(REPORT)]


def test_nothing_found() -> None:
    lines = shown(REPORT)
    assert "the backend's process: descriptors 12, anonymous 3 MiB, cpu seconds 1.25, log 100 B" in lines
    assert "  no --control: not checked that status is answered" in [line.rstrip() for line in lines]
    assert lines[-1] == f"nothing found: {TOTAL}"


def test_a_process_that_was_not_seen_has_no_figures() -> None:
    assert not any("process" in line for line in shown(replace(REPORT, figures={})))


def test_what_was_found_and_how_to_find_it_again() -> None:
    lines = shown(replace(REPORT, finding=FOUND))
    at = lines.index(f"content: {FOUND.text}")
    assert lines[at + 1 :] == [
        f"in connection 12 at step 40 ({TOTAL}); before it, newest last:",
        "  driver: starts [red]",
        "  end: closed: nothing",
        "that connection alone: hostzero fuzz '/run/my [red] socket' --control ctl --seed 7 --episode 12",
    ]
    assert not any("nothing found" in line for line in lines)


# ---------------------------------------------------------------------------- progress


def test_a_log_gets_a_line_now_and_then() -> None:
    log = io.StringIO()
    with open_progress(60.0, log) as tell:
        for spent in (0.1, LINE_EVERY - 0.1, LINE_EVERY + 0.2, LINE_EVERY + 0.3, 2 * LINE_EVERY + 0.4):
            tell(spent, 1000, round(spent * 1000))
    assert log.getvalue() == "5 s: 1,000 connections, 5,200 steps\n10 s: 1,000 connections, 10,400 steps\n"


def test_a_terminal_gets_a_bar_that_is_gone_afterwards() -> None:
    terminal = Terminal()
    with open_progress(60.0, terminal) as tell:
        tell(1.0, 1000, 2000)
    text = terminal.getvalue()
    assert "1,000 connections, 2,000 steps" in text
    assert text.endswith("\x1b[2K")  # the line is erased
