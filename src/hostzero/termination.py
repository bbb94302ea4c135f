# SPDX-License-Identifier: GPL-2.0-only
"""SIGTERM and SIGHUP for work that has guests, devices or copies to clear away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def ending_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end this process and can be heard before that, but for Ctrl-C's.

    A terminal that goes away sends SIGHUP; who started the process under ``nohup`` wants it to live on.
    """
    hears_hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGHUP) if hears_hangup else (signal.SIGTERM,)


class Terminated(SystemExit):
    """A signal has told the process to end; the status is what a shell gives it.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        """End because of signal `number`."""
        super().__init__(128 + number)
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """Leave by way of every `finally` when the process is told to end, with the status that a shell gives it.

    Only the main thread can; in another one this does nothing.

    Raises:
        Terminated: inside the context, wherever it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(number: int, _frame: object) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, terminated) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
