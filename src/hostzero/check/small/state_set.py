# SPDX-License-Identifier: GPL-2.0-only
"""A set of states, each known by 128 bits of fingerprint.

Open addressing with linear probing in one array, two words an entry, so that a lookup costs one
cache line. Compiled code adds; Python gives it a table of twice the size when half is taken.

Two states with one fingerprint would be taken for the same: the second would not be looked
into, so a violation that only it leads to could be missed, and nothing would tell. A violation
that is found is real all the same. Among n states the chance of any such pair is about
n² / 2¹²⁹: for ten million states less than one in 10²⁴, far below that of a memory error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero.jit import compiled, inline

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYTES_PER_SLOT: Final = 16
_FIRST_SLOTS: Final = 1 << 12


@inline
def add(table: object, a: int, b: int) -> bool:
    """Add a fingerprint; return whether it was not there before.

    The table must have a free slot. `(0, 0)` marks one, so that pair stands for `(0, 1)`.
    """
    if a == 0 and b == 0:
        b = 1
    mask = len(table) // 2 - 1  # type: ignore[arg-type]
    slot = a & mask
    while True:
        there_a = table[2 * slot]  # type: ignore[index]
        there_b = table[2 * slot + 1]  # type: ignore[index]
        if there_a == a and there_b == b:
            return False
        if there_a == 0 and there_b == 0:
            table[2 * slot] = a  # type: ignore[index]
            table[2 * slot + 1] = b  # type: ignore[index]
            return True
        slot = (slot + 1) & mask


@compiled
def add_all(table: object, old: object) -> int:
    """Add what another table holds; return how many that were."""
    added = 0
    for slot in range(len(old) // 2):  # type: ignore[arg-type]
        a = old[2 * slot]  # type: ignore[index]
        b = old[2 * slot + 1]  # type: ignore[index]
        if (a != 0 or b != 0) and add(table, a, b):
            added += 1
    return added


class StateSet:
    """The states that have been seen.

    Attributes:
        table: what `add` takes: two words a slot, the number of slots a power of two.
        count: how many states there are; who adds in compiled code keeps it.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.table: NDArray[np.int64] = np.zeros(2 * _FIRST_SLOTS, dtype=np.int64)
        self.count = 0

    @property
    def room(self) -> int:
        """How many states can be added before the table must grow: it is kept half empty."""
        return len(self.table) // 4 - self.count

    @property
    def nbytes(self) -> int:
        """How much memory the table takes."""
        return self.table.nbytes

    def bytes_with_room(self, states: int) -> int:
        """Return how much memory `make_room` would need at once, the old table included."""
        return self.nbytes + BYTES_PER_SLOT * self._slots_for(states)

    def make_room(self, states: int) -> None:
        """Grow, if need be, until so many states can be added."""
        slots = self._slots_for(states)
        if slots > len(self.table) // 2:
            old, self.table = self.table, np.zeros(2 * slots, dtype=np.int64)
            add_all(self.table, old)

    def add(self, a: int, b: int) -> bool:
        """Add a fingerprint; return whether it was not there before."""
        self.make_room(1)
        is_new = bool(add(self.table, a, b))
        self.count += is_new
        return is_new

    def _slots_for(self, states: int) -> int:
        slots = len(self.table) // 2
        while slots // 2 - self.count < states:
            slots *= 2
        return slots
