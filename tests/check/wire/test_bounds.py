# SPDX-License-Identifier: GPL-2.0-only
"""A loop that does not end is ended."""

from __future__ import annotations

import signal
import threading

import pytest

from hostzero.check.wire.bounds import TakesForEver, bounded


def test_a_loop_without_an_end_is_stopped() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TakesForEver), bounded(0.01):
        _loop()
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_outside_the_main_thread_nothing_is_stopped() -> None:
    done = []

    def work() -> None:
        with bounded(0.01):
            done.append(signal.getitimer(signal.ITIMER_VIRTUAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [(0.0, 0.0)]


def _loop() -> None:
    while True:
        pass
