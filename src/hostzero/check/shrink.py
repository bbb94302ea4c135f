# SPDX-License-Identifier: GPL-2.0-only
"""Making a failing sequence of steps short: delta debugging, and smaller arguments.

Source: A. Zeller and R. Hildebrandt, "Simplifying and isolating failure-inducing input" (2002),
`ddmin`, here without its complements of the first rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

S = TypeVar("S")


def shrink_steps(steps: Sequence[S], fails: Callable[[Sequence[S]], bool]) -> list[S]:
    """Return a shortest sequence found that still fails: no single step of it can be left out.

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
            return current
        if not removed:
            size = max(size // 2, 1)
        size = min(size, max(len(current), 1))


def shrink_arguments(
    steps: Sequence[list[object]], fails: Callable[[Sequence[list[object]]], bool]
) -> list[list[object]]:
    """Return the steps with integers made as small as they can be, one after the other.

    The first element of a step is its name and stays.
    """
    current = [list(step) for step in steps]
    for at in range(len(current)):
        for place in range(1, len(current[at])):
            value = current[at][place]
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            for smaller in (0, 1, value // 2, value - 1):
                if not 0 <= smaller < value:
                    continue
                candidate = [list(step) for step in current]
                candidate[at][place] = smaller
                if fails(candidate):
                    current = candidate
                    break
    return current
