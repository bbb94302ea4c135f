# SPDX-License-Identifier: GPL-2.0-only
"""Waiting for another process: look, and look again, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from hostzero.errors import VmError

INTERVAL: Final = 0.02
"""Seconds between two looks."""

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, seconds: float, interval: float = INTERVAL) -> T:
    """Return the first true thing that `look` returns.

    Args:
        look: called again and again; what it raises ends the waiting.
        what: what is waited for, for the error.
        seconds: how long.
        interval: seconds between two looks.

    Raises:
        VmError: nothing true came in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise VmError(f"{what}: not within {seconds:g} s")
        time.sleep(interval)
