# SPDX-License-Identifier: GPL-2.0-only
"""SIGTERM for work that has guests, devices or copies to clear away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
