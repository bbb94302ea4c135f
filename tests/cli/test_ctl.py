# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero ctl`` against a device in another process: every command, its JSON, its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hostzero.cli.main import run
from tests.device.guest import RAM_BYTES

MIB = 1 << 20


@pytest.fixture
def ask(control: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that has to succeed and return its JSON."""

    def asked(*arguments: str) -> dict[str, Any]:
        assert run(["ctl", str(control), *arguments, "--json"]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        result: dict[str, Any] = json.loads(shown.out)
        return result

    return asked


def test_resize_is_what_the_guest_keeps(ask: Any) -> None:
    result = ask("resize", "7M")
    assert (result["memory_bytes"], result["target_bytes"]) == (RAM_BYTES, RAM_BYTES - 7 * MIB)
    assert ask("status")["device"]["target_bytes"] == RAM_BYTES - 7 * MIB


def test_resize_of_the_balloon_waits_for_the_guest(ask: Any) -> None:
    for size in ("3M", "1M", "0"):
        result = ask("resize", "--balloon", size, "--wait")
        assert result["actual_bytes"] == result["target_bytes"] == int(size.removesuffix("M")) * MIB
        assert result["guest_bytes"] == RAM_BYTES - result["actual_bytes"]


def test_a_resize_that_the_guest_does_not_reach(control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ctl", str(control), "resize", "--balloon", "4M", "--wait", "--timeout", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hostzero ctl: error: after 0 s: balloon ")
    assert "to be 4 MiB" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resize"], "give either SIZE, what the guest keeps, or --balloon SIZE"),
        (["resize", "1M", "--balloon", "1M"], "give either SIZE"),
        (["resize", "much"], "'much' is not a size"),
        (["resize", "4097"], "guest_bytes 4097 is not a multiple of 4096"),
        (["resize", "1T"], "1T is more than the guest has: 8M"),
        (["resize", "1M", "--timeout", "3"], "--timeout is for --wait"),
        (["hint", "begin"], "'begin' is not one of"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_a_wrong_command_line_changes_nothing(
    ask: Any, control: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ctl", str(control), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert ask("status")["device"]["target_bytes"] == 0


def test_stats_are_fresh(ask: Any) -> None:
    before = ask("status")["metrics"]["device"]["stats_updates"]
    assert ask("stats") == {"fresh": True, "statistics": {"memfree": 77 * MIB, "oom_kill": 3}}
    assert ask("status")["metrics"]["device"]["stats_updates"] == before + 1


def test_hint(ask: Any) -> None:
    assert ask("hint", "start")["cmd_id"] == 0x8000_0000
    assert ask("hint", "stop") == {"hint": "stopped"}
    assert ask("hint", "done") == {"hint": "done"}
    assert ask("status")["device"]["hint"] == "done"


def test_status_and_metrics_agree(ask: Any) -> None:
    status, metrics = ask("status"), ask("metrics")
    assert status["metrics"].keys() == metrics.keys()
    assert (
        metrics["device"]["inflate"]["malformed"] >= status["metrics"]["device"]["inflate"]["malformed"] > 0
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["resize", "8M"], "balloon 0 B; the guest has 8 MiB of 8 MiB"),
        (["stats"], "memfree"),
        (["hint", "done"], "hinting: done"),
        (["status"], "malformed requests, inflate"),
        (["metrics"], "proven_zero_bytes"),
    ],
)
def test_text_for_people(
    control: Path, arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ctl", str(control), *arguments]) == 0
    assert shown in capsys.readouterr().out


def test_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ctl", str(tmp_path / "ctl"), "status"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hostzero ctl: error: {tmp_path / 'ctl'}: there is no such socket")


def test_help_says_what_a_size_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ctl", "SOCKET", "resize", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "SIZE is what remains for the guest, as with QEMU's QMP command balloon" in shown
