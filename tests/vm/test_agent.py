# SPDX-License-Identifier: GPL-2.0-only
"""The host's end of the serial port, against a guest that is a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hostzero.errors import VmError
from hostzero.vm.agent import LINE_MAX, Agent, Answer, Unanswered, parse_header


@pytest.fixture
def ends() -> Iterator[tuple[Agent, socket.socket]]:
    ours, guests = socket.socketpair()
    agent = Agent(ours)
    yield agent, guests
    agent.close()
    guests.close()


@pytest.mark.parametrize(
    ("line", "header"),
    [
        (b"@1 0 12\n", ("1", 0, 12)),
        (b"@ready 0 0\r\n", ("ready", 0, 0)),
        (b"@7 127    4", ("7", 127, 4)),
        (b"[    1.0] Kernel panic", None),
        (b"@1 0", None),
        (b"@1 0 99999999999", None),
        (b"", None),
    ],
)
def test_headers(line: bytes, header: tuple[str, int, int] | None) -> None:
    assert parse_header(line) == header


def test_a_command_and_its_answer(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    guest.sendall(b"@ready 0 0\n@1 0 6\nhello\n@2 3 4\noops")
    agent.wait_ready(1)
    assert agent.read("echo hello") == "hello\n"
    assert agent.run("fail", check=False) == Answer(3, "oops")
    assert guest.recv(100) == b"1 echo hello\n2 fail\n"


def test_a_command_that_must_succeed(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    guest.sendall(b"@1 2 7\nno such")
    with pytest.raises(VmError, match=r"'ls x' ended with 2: no such"):
        agent.run("ls x")


def test_noise_and_answers_to_others_are_passed_over(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    guest.sendall(b"[ 1.0] Emergency\n\n@9 0 3\nold@1 0 2\nok")
    assert agent.read("x") == "ok"


def test_an_output_may_look_like_a_header(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    guest.sendall(b"@1 0 8\n@2 0 0\n\n@2 0 1\n!")
    assert agent.read("x") == "@2 0 0\n\n"
    assert agent.read("y") == "!"


def test_a_silent_guest_has_a_deadline_and_may_answer_later(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    agent.start("slow")
    guest.sendall(b"@1 0 5\nhal")
    with pytest.raises(Unanswered, match=r"within 0.01 s"):
        agent.finish(0.01)
    guest.sendall(b"f.")
    assert agent.finish(1) == Answer(0, "half.")


def test_qemu_that_ends_is_said(ends: tuple[Agent, socket.socket]) -> None:
    agent, guest = ends
    guest.close()
    with pytest.raises(Unanswered):
        agent.run("anything", 1)


@pytest.mark.parametrize("command", ["a\nb", "x" * LINE_MAX])
def test_a_command_that_is_no_line_is_refused(ends: tuple[Agent, socket.socket], command: str) -> None:
    with pytest.raises(ValueError, match="not a line"):
        ends[0].run(command)
