# SPDX-License-Identifier: GPL-2.0-only
"""What is sent to a control socket, and which answers are none."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from hostzero.conform.fuzz import control_garbage, peer
from hostzero.conform.fuzz.control_garbage import LINES, pester
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.conform.fuzz.peer import Log
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX
from tests.conform.fuzz import fakes

REFUSED = b'{"version": 1, "ok": false, "error": {"kind": "malformed", "message": ""}}\n'
Answer = Callable[[bytes], bytes]


def lines(kind: str, count: int = 300) -> list[bytes]:
    return [LINES[kind][1](Random(seed)) for seed in range(count)]


def pestered(folder: Path, answer: Answer, seeds: range) -> Log:
    log = Log()
    with fakes.control(folder / "ctl", answer):
        for seed in seeds:
            pester(Random(seed), folder / "ctl", log)
    return log


def found(folder: Path, answer: Answer) -> str:
    with pytest.raises(Found) as caught:
        pestered(folder, answer, range(20))
    assert caught.value.kind is Kind.STATUS
    return str(caught.value)


def test_a_line_is_one_line_and_comes_again() -> None:
    for kind in LINES:
        assert lines(kind) == lines(kind)
        assert len(set(lines(kind))) > 2
        assert not any(b"\n" in line for line in lines(kind))


def test_lines_are_as_long_as_they_may_be_and_longer() -> None:
    sizes = {len(line) + 1 for line in lines("control: long line")}
    assert {LINE_BYTES_MAX, LINE_BYTES_MAX + 1} < sizes
    assert max(sizes) > 10 * LINE_BYTES_MAX
    assert max(len(line) for kind in LINES if "long" not in kind for line in lines(kind)) < LINE_BYTES_MAX


def test_most_commands_are_ones_that_there_are() -> None:
    commands = [json.loads(line) for line in lines("control: command")]
    known = [each for each in commands if each["version"] == 1 and each["command"] not in {"no", 5}]
    assert len(known) > len(commands) / 2
    assert {each["command"] for each in known} == {"status", "metrics", "resize", "stats", "hint"}


def test_answers_are_counted_by_kind(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def answer(line: bytes) -> bytes:
        heard.append(line)
        return fakes.status() if len(heard) % 2 else REFUSED

    log = pestered(tmp_path, answer, range(40))
    assert set(log.done) == set(LINES)
    assert log.answers["control: done"] > 10
    assert log.answers["control: malformed"] > 10
    assert sum(log.answers.values()) == log.steps
    assert sum(line.startswith(b'{"version": 1, "command": "sta') for line in heard) > 0


def test_what_was_sent_is_told_without_a_byte_that_a_terminal_obeys(tmp_path: Path) -> None:
    log = pestered(tmp_path, lambda _line: REFUSED, range(40))
    assert all(line.isprintable() for line in log.last)
    assert any("\\x" in line for line in log.last)


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(Found, match="the control socket: No such file") as caught:
        pester(Random(1), tmp_path / "ctl", Log())
    assert caught.value.kind is Kind.STATUS


@pytest.mark.parametrize("answer", [b"?\n", b"[]\n", b'{"ok": false}\n', b'{"ok": false, "error": 1}\n'])
def test_an_answer_that_is_none(tmp_path: Path, answer: bytes) -> None:
    assert found(tmp_path, lambda _line: answer) == f"{answer!r} is no answer"


def test_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "PATIENCE", 0.05)
    assert found(tmp_path, lambda _line: b"{").startswith("no answer to b")


def test_an_end_instead_of_an_answer(tmp_path: Path) -> None:
    assert found(tmp_path, lambda line: b"" if len(line) < LINE_BYTES_MAX else REFUSED).startswith(
        "the connection ends without an answer to b"
    )


def test_a_line_that_is_too_long_may_end_the_connection(tmp_path: Path) -> None:
    log = pestered(tmp_path, lambda line: b"" if len(line) > LINE_BYTES_MAX else REFUSED, range(60))
    assert log.answers["control: malformed"] < log.steps


def test_whoever_closes_after_an_answer_is_no_worse_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = 0

    def answered_and_closed(sock: socket.socket, line: bytes, log: Log) -> bool:
        nonlocal ended
        ended += 1
        with contextlib.suppress(OSError):  # it was, by the line before
            sock.shutdown(socket.SHUT_RDWR)
        return True

    monkeypatch.setattr(control_garbage, "_exchange", answered_and_closed)
    pestered(tmp_path, lambda _line: REFUSED, range(40))
    assert ended > 40
