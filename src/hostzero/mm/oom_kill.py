# SPDX-License-Identifier: GPL-2.0-only
"""Asking whoever holds memory to give some back, when there is none (kernel: `mm/oom_kill.c`).

There are no processes to kill on anyone's behalf, so an allocation whose notifiers free nothing
fails, and that is counted as a kill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from hostzero.mm.mmzone import Memory

MAX_RECLAIM_RETRIES: Final = 16
"""Rounds without progress after which an allocation gives up (kernel: same name, `mm/internal.h`)."""

_log = logging.getLogger(__name__)


def nr_unowned_pages(mem: Memory) -> int:
    """Return how many pages nobody owns: free, parked on a per-CPU list, or deferred."""
    zones = mem.zone
    return int(zones.nr_free_pages.sum()) + int(mem.pcp["count"].sum()) + int(zones.nr_trylock_free.sum())


class OomNotifiers:
    """The chain of callbacks that `out_of_memory` runs (kernel: `oom_notify_list`).

    Attributes:
        kills: how often nothing could be freed.
    """

    def __init__(self, mem: Memory) -> None:
        """Start with nobody to ask."""
        self.kills = 0
        self._mem = mem
        self._callbacks: list[Callable[[], int]] = []
        self._rounds = 0
        self._unowned_before = -1

    def register(self, callback: Callable[[], int]) -> Callable[[], None]:
        """Ask `callback` too; it returns how many pages it freed. Returns what takes it off again."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def out_of_memory(self) -> bool:
        """Run the chain; return whether another try is worth while (kernel: same name).

        The kernel takes a notifier's word and tries again as long as it says that it freed pages.
        Here a chain that claims pages while not one more page is free is asked at most
        MAX_RECLAIM_RETRIES times in a row: a balloon that is wrong about its size must not hang
        the guest.
        """
        before = nr_unowned_pages(self._mem)
        claimed = sum(callback() for callback in list(self._callbacks))
        after = nr_unowned_pages(self._mem)
        # Another number than last time means that somebody got on meanwhile.
        stuck = after <= before == self._unowned_before
        self._rounds = self._rounds + 1 if stuck else 1
        self._unowned_before = after
        if claimed > 0 and self._rounds < MAX_RECLAIM_RETRIES:
            return True
        if claimed > 0:
            _log.warning("out of memory: the notifiers claimed pages %d times and freed none", self._rounds)
        self._unowned_before = -1
        self.kills += 1
        return False
