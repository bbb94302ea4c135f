# SPDX-License-Identifier: GPL-2.0-only
"""The story of a page: only what changed, and what was found."""

from __future__ import annotations

from hostzero.check.recording import Step
from hostzero.check.small.story import story_of
from hostzero.check.violation import Violation

STEPS: list[Step] = [["a", 1], ["b"], ["a", 2], ["c"]]


def test_only_changes_are_told() -> None:
    states = iter(["free", "free", "owned", "owned", "free"])
    assert story_of(STEPS, lambda _: None, lambda: next(states)) == (
        "at boot: free",
        "step 2, b: owned",
        "step 4, c: free",
    )


def test_the_story_ends_where_something_is_found() -> None:
    done: list[Step] = []

    def do(step: Step) -> Violation | None:
        done.append(step)
        return Violation("rot", "it is wrong") if step == ["a", 2] else None

    assert story_of(STEPS, do, lambda: "free") == ("at boot: free", "step 3, a 2: it is wrong")
    assert done == STEPS[:3]
