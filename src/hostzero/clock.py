# SPDX-License-Identifier: GPL-2.0-only
"""Guest time: a clock that only a caller turns, with delayed work on it.

The kernel queues page reporting on a workqueue two seconds after the first large
free. Nothing here reads a real clock: a test, a benchmark or a program that serves
a real machine decides when time passes, and so every run can be repeated exactly.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000


class DelayedWork:
    """One function that runs once, later (kernel: `struct delayed_work`)."""

    def __init__(self, clock: Clock, function: Callable[[], None]) -> None:
        """Tie `function` to `clock` without queueing it."""
        self._clock = clock
        self._function = function
        self._ticket: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the function is queued and has not run."""
        return self._ticket is not None

    def schedule(self, delay: float) -> bool:
        """Queue the function `delay` seconds ahead; False if it was queued already."""
        if self._ticket is not None:
            return False
        self._ticket = self._clock._queue(delay, self)
        return True

    def flush(self) -> bool:
        """Run the function now if it is queued (kernel: `flush_delayed_work`)."""
        if self._ticket is None:
            return False
        self._ticket = None
        self._function()
        return True

    def cancel(self) -> bool:
        """Take the function off the queue; False if it was not queued."""
        was_pending, self._ticket = self.pending, None
        return was_pending

    def _run(self, ticket: int) -> None:
        if self._ticket == ticket:
            self.flush()


class Clock:
    """Guest time in nanoseconds since boot, turned by `advance`."""

    def __init__(self) -> None:
        """Start at zero with nothing queued."""
        self.now_ns = 0
        self._tickets = itertools.count()
        self._due: list[tuple[int, int, DelayedWork]] = []
        self._hooks: list[Callable[[], None]] = []

    def before_advance(self, hook: Callable[[], None]) -> None:
        """Call `hook` before time moves and after each piece of work.

        Compiled code cannot queue work: it leaves a request in a record, and its
        owner turns the request into delayed work here, while it is still the same
        instant.
        """
        self._hooks.append(hook)

    def delayed_work(self, function: Callable[[], None]) -> DelayedWork:
        """Return `function` as work that can be queued on this clock."""
        return DelayedWork(self, function)

    def advance(self, seconds: float) -> None:
        """Let time pass, running what falls due in order of its due time.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time cannot run backwards: advance({seconds})")
        end = self.now_ns + round(seconds * NSEC_PER_SEC)
        self._run_hooks()
        while self._due and self._due[0][0] <= end:
            due, ticket, work = heapq.heappop(self._due)
            self.now_ns = max(self.now_ns, due)
            work._run(ticket)
            self._run_hooks()
        # Not back: what fell due may have let time pass itself.
        self.now_ns = max(self.now_ns, end)

    def _run_hooks(self) -> None:
        for hook in self._hooks:
            hook()

    def _queue(self, delay: float, work: DelayedWork) -> int:
        ticket = next(self._tickets)
        heapq.heappush(self._due, (self.now_ns + round(delay * NSEC_PER_SEC), ticket, work))
        return ticket
