# SPDX-License-Identifier: GPL-2.0-only
"""The view as text: snapshots of a recorded status, in a wide and in a small terminal."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from hostzero.cli.top_view import render
from tests.vhost_user.control_status import later, recorded

SNAPSHOTS = Path(__file__).parent / "snapshots"


def drawn(look: tuple[object, ...], width: int) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(*look), highlight=False)  # type: ignore[arg-type]
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize("width", [118, 80])
def test_the_view_is_as_it_was(width: int) -> None:
    """HOSTZERO_SNAPSHOTS=write writes them anew; look at the difference before you commit it."""
    text = drawn((later(), recorded(), 2.0), width)
    path = SNAPSHOTS / f"top-{width}.txt"
    if os.environ.get("HOSTZERO_SNAPSHOTS") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_rates_are_by_the_second() -> None:
    rows = [line.split() for line in drawn((later(), recorded(), 2.0), 118).splitlines()]
    (inflate,) = (row for row in rows if row[:1] == ["inflate"])
    assert inflate[:7] == ["inflate", "568", "128", "566", "MiB", "128", "MiB"]


@pytest.mark.parametrize("look", [(recorded(), None, 0.0), (recorded(), recorded(), 0.0)])
def test_the_first_look_has_no_rates(look: tuple[object, ...]) -> None:
    rows = [line.split() for line in drawn(look, 118).splitlines()]
    (deflate,) = (row for row in rows if row[:1] == ["deflate"])
    assert deflate[:3] == ["deflate", "0", "–"]


def test_no_line_is_wider_than_the_terminal() -> None:
    assert max(map(len, drawn((later(), recorded(), 2.0), 80).splitlines())) <= 80


def test_a_device_without_guest() -> None:
    status = recorded()
    status["session"] |= {"state": "listening", "connected": False, "peer_pid": None, "queues": []}
    status["device"] |= {"live": False, "memory_bytes": 0, "actual_bytes": 0, "guest_bytes": 0}
    status["statistics"] = {}
    text = drawn((status, None, 0.0), 118)
    assert "no VMM; session listening; no driver" in text
    assert "features offered:" in text


def test_a_guest_that_claims_more_than_it_has_does_not_break_the_bar() -> None:
    status = recorded()
    status["device"]["actual_bytes"] = 0xFFFF_FFFF << 12
    assert "balloon 16.0 TiB" in drawn((status, None, 0.0), 118)
