# SPDX-License-Identifier: GPL-2.0-only
"""SIGTERM and SIGHUP run every `finally` and have a status of their own; what was before is there again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from hostzero.termination import Terminated, ending_signals, terminable


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """SIGHUP as in a terminal, whatever these tests run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_begun_is_ended(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ended: list[str] = []

    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                ended.append("it")

    with pytest.raises(Terminated) as caught:
        work()
    assert caught.value.number == number
    assert caught.value.code == 128 + number
    assert ended == ["it"]
    assert signal.getsignal(number) is before


def test_under_nohup_a_hangup_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with terminable():
        os.kill(os.getpid(), signal.SIGHUP)
        assert ending_signals() == (signal.SIGTERM,)


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
