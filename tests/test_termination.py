# SPDX-License-Identifier: GPL-2.0-only
"""SIGTERM runs every `finally` and ends with its own status; what was there before is there again."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from hostzero.termination import Terminated, terminable


def test_what_was_begun_is_ended() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended: list[str] = []

    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                ended.append("it")

    with pytest.raises(Terminated) as caught:
        work()
    assert caught.value.number == signal.SIGTERM
    assert caught.value.code == 128 + signal.SIGTERM
    assert ended == ["it"]
    assert signal.getsignal(signal.SIGTERM) is before


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
