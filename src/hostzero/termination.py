# SPDX-License-Identifier: GPL-2.0-only
"""SIGTERM for work that has guests, devices or copies to clear away."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Leave by way of every `finally` when the process is told to end, with the status that a shell gives it.

    Only the main thread can; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
