# SPDX-License-Identifier: GPL-2.0-only
"""The story of one page: what became of it, step by step, until something was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hostzero.check.recording import Step
from hostzero.check.violation import Violation


def story_of(
    taken: Sequence[Step], do: Callable[[Step], Violation | None], state: Callable[[], str]
) -> tuple[str, ...]:
    """Do steps and return each change of a page's state, and what is found at the end.

    Args:
        taken: the steps.
        do: does one; returns what is found.
        state: says where the page is now, and what is said of it.
    """
    last = state()
    events = [f"at boot: {last}"]
    for number, step in enumerate(taken, 1):
        said = f"step {number}, {' '.join(str(part) for part in step)}"
        found = do(step)
        if found is not None:
            events.append(f"{said}: {found.what}")
            break
        now = state()
        if now != last:
            events.append(f"{said}: {now}")
            last = now
    return tuple(events)
