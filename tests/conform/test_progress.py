# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io

import pytest

from hostzero.conform.progress import open_progress
from tests.conform.results import FAILED, PASSED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hostzero.conform.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    with open_progress(3, log) as told:
        for result in (PASSED, FAILED, PASSED):
            told.began(result.case)
            now[0] += 3
            told.ended(result)
    assert log.getvalue() == "2 of 3 cases, 1 failed\n"


def test_a_terminal_gets_a_bar_that_is_gone_afterwards() -> None:
    terminal = Terminal()
    with open_progress(2, terminal) as told:
        told.began(PASSED.case)
        told.ended(PASSED)
        told.began(FAILED.case)
        told.ended(FAILED)
    assert terminal.getvalue()
