# SPDX-License-Identifier: GPL-2.0-only
"""The qtest protocol against an end that is written by hand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostzero.conform.qtest import Qtest
from hostzero.errors import TargetError


@contextmanager
def talking(*answers: bytes, seconds: float = 5.0) -> Iterator[tuple[Qtest, list[str]]]:
    """A session whose other end gives these answers, one a line that comes, and then leaves."""
    ours, theirs = socket.socketpair()
    heard: list[str] = []

    def answer() -> None:
        with theirs, theirs.makefile("rb") as lines:
            for each in answers:
                line = lines.readline()
                if not line:
                    return
                heard.append(line.decode().strip())
                theirs.sendall(each)

    thread = threading.Thread(target=answer)
    thread.start()
    session = Qtest(ours, lambda: "QEMU ended (signal SIGABRT)", seconds)
    try:
        yield session, heard
    finally:
        session.close()
        thread.join()


def test_accesses_and_their_answers() -> None:
    answers = [b"OK\n", b"OK 0x10451af4\n", b"OK\n", b"OK 0x0000000000000003\n"]
    with talking(*answers) as (session, heard):
        session.outl(0xCF8, 0x8000_2000)
        assert session.inl(0xCFC) == 0x1045_1AF4
        session.write(0xE000_0014, 1, 3)
        assert session.read(0xE000_0014, 1) == 3
    assert heard == ["outl 0xcf8 0x80002000", "inl 0xcfc", "writeb 0xe0000014 0x3", "readb 0xe0000014"]


def test_an_answer_may_come_in_pieces() -> None:
    with talking(b"OK 0x1", b"5\n") as (session, _):
        # The second piece answers a line that is sent while the session waits.
        nudge = threading.Timer(0.05, lambda: session._socket.sendall(b"nudge\n"))
        nudge.start()
        assert session.read(0x10, 4) == 0x15
        nudge.join()


@pytest.mark.parametrize("answer", [b"FAIL Unknown command 'inl'\n", b"OK soon\n", b"IRQ raise 4\n"])
def test_another_answer_is_an_error(answer: bytes) -> None:
    with talking(answer) as (session, _), pytest.raises(TargetError, match="QEMU answers 'inl 0xcfc' with"):
        session.inl(0xCFC)


def test_an_end_without_an_answer_says_what_became_of_qemu() -> None:
    with talking(b"") as (session, _):
        with pytest.raises(TargetError, match="signal SIGABRT"):
            session.read(0, 2)
        with pytest.raises(TargetError, match="signal SIGABRT"):
            session.write(0, 2, 1)


def test_silence_is_an_error_after_a_while() -> None:
    # The first answer is nothing, and the second waits for a line that never comes.
    match = r"does not answer 'readw 0x4' within 0.05 s"
    with talking(b"", b"OK\n", seconds=0.05) as (session, _), pytest.raises(TargetError, match=match):
        session.read(4, 2)
