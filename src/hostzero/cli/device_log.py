# SPDX-License-Identifier: GPL-2.0-only
"""The log of ``hostzero device``: which guest a line is about, and never more lines than a disk can bear.

Each session and each device limits what it says of one peer. A peer that comes again and again
has a new session each time, so the process has limits of its own: one for what is wrong and one
for what goes as it should (``--verbose``), so that the second never hides the first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TextIO

BURST: Final = 128
"""Lines of one kind that may come at once."""
LINES_PER_SECOND: Final = 1.0
"""At which rate more lines may come after that."""


class _Budget:
    """Lines that may still come; they fill up again with time, to a burst at most."""

    def __init__(self, now: float) -> None:
        self._filled_at = now
        self._lines = float(BURST)

    def spend(self, now: float) -> bool:
        """Take one line, if there is one."""
        self._lines = min(self._lines + (now - self._filled_at) * LINES_PER_SECOND, BURST)
        self._filled_at = now
        if self._lines < 1:
            return False
        self._lines -= 1
        return True


class DeviceLog(logging.StreamHandler[TextIO]):
    """Writes each line with the name of the guest, as long as there are not too many."""

    def __init__(
        self,
        label: Callable[[], str],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to `stream`, standard error unless given; `label` says which guest is served."""
        super().__init__(stream)
        self.setFormatter(logging.Formatter("hostzero device: %(levelname)s: %(guest)s: %(message)s"))
        self._label = label
        self._clock = clock
        self._warnings, self._others = _Budget(clock()), _Budget(clock())
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or count it if there were too many; errors are never too many."""
        budget = self._warnings if record.levelno >= logging.WARNING else self._others
        if record.levelno < logging.ERROR and not budget.spend(self._clock()):
            self._left_out += 1
            return
        if self._left_out:
            record.msg = f"({self._left_out} lines were left out before this one) {record.getMessage()}"
            record.args = None
            self._left_out = 0
        record.guest = self._label()
        super().emit(record)
