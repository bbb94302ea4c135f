# SPDX-License-Identifier: GPL-2.0-only
"""An end to loops that a hostile peer can start: work for one operation is bounded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

PATIENCE: Final = 10.0
"""Seconds of processor time for one operation, which takes milliseconds. What lasts longer does not end."""


class TakesForEver(BaseException):
    """An operation was stopped; no `except Exception` on the way may take it for its own."""


@contextmanager
def bounded(seconds: float = PATIENCE) -> Iterator[None]:
    """Stop what runs inside after some processor time by `TakesForEver`.

    Only in the main thread, which alone gets signals; elsewhere nothing is stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise TakesForEver
