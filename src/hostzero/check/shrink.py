# SPDX-License-Identifier: GPL-2.0-only
"""Making a failing sequence of steps short: delta debugging, and smaller arguments.

Source: A. Zeller and R. Hildebrandt, "Simplifying and isolating failure-inducing input" (2002),
`ddmin`, here without its complements of the first rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

S = TypeVar("S")

PAIRS_UP_TO: Final = 32
"""Of so many steps pairs are tried, some 500; of more it would take longer than anyone waits."""


def shrink_steps(steps: Sequence[S], fails: Callable[[Sequence[S]], bool]) -> list[S]:
    """Return a shortest sequence found that still fails: no single step of it can be left out.

    If it is short, no two steps can be left out together either, as an allocation and its free.

    Args:
        steps: a sequence for which `fails` is True.
        fails: whether a sequence fails in the same way; called often.
    """
    current = list(steps)
    size = max(len(current) // 2, 1)
    while True:
        removed = False
        # From the end: what comes last depends on what comes first, seldom the other way round.
        start = len(current) - size
        while start > -size:
            low = max(start, 0)
            candidate = current[:low] + current[start + size :]
            if len(candidate) < len(current) and fails(candidate):
                current = candidate
                removed = True
            start -= size
        if size == 1 and not removed:
            shorter = _without_a_pair(current, fails)
            if shorter is None:
                return current
            current = shorter
        elif not removed:
            size = max(size // 2, 1)
        size = min(size, max(len(current), 1))


def _without_a_pair(steps: list[S], fails: Callable[[Sequence[S]], bool]) -> list[S] | None:
    """Return the steps without two of them, wherever these are, or None if none can be spared."""
    if len(steps) > PAIRS_UP_TO:
        return None
    for second in range(len(steps) - 1, 0, -1):
        for first in range(second - 1, -1, -1):
            candidate = steps[:first] + steps[first + 1 : second] + steps[second + 1 :]
            if fails(candidate):
                return candidate
    return None


def shrink_arguments(
    steps: Sequence[list[object]], fails: Callable[[Sequence[list[object]]], bool]
) -> list[list[object]]:
    """Return the steps with integers made as small as they can be, one after the other.

    The first element of a step is its name and stays. Each integer is 0 if that fails too, else
    one that does not fail when it is less by one; it is found by halving, in some 60 tries at most.
    """
    current = [list(step) for step in steps]

    def fails_with(at: int, place: int, value: int) -> bool:
        candidate = [list(step) for step in current]
        candidate[at][place] = value
        return fails(candidate)

    for at, step in enumerate(current):
        for place in range(1, len(step)):
            high = step[place]
            if isinstance(high, bool) or not isinstance(high, int) or high <= 0:
                continue
            if fails_with(at, place, 0):
                step[place] = 0
                continue
            low = 0
            while high - low > 1:
                middle = (low + high) // 2
                if fails_with(at, place, middle):
                    high = middle
                else:
                    low = middle
            step[place] = high
    return current
