# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from hostzero.check.recording import Recording
from hostzero.check.search import Findings, Limits
from hostzero.check.small.exhaustive import ExhaustiveSearch
from hostzero.check.small.scopes import SCOPES, Scope
from hostzero.errors import UsageError
from tests.check.small import toy

SMALL = Scope("small", "a guest that is closed at once", toy.Setup(pages=2))
LARGE = Scope("large", "a guest that takes longer", toy.Setup(pages=4, orders=(0,)))


def search(*scopes: Scope, **options: Any) -> ExhaustiveSearch:
    return ExhaustiveSearch(scopes, toy, toy.expand, **options)


class Heard:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int | None, str]] = []

    def __call__(self, operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
        self.told.append((operations, states, note))


def run(what: ExhaustiveSearch, seconds: float = 60.0, **limits: Any) -> Findings:
    return what.run(Limits(seconds, **limits), 0, Heard())


def test_scopes_are_closed_one_after_the_other_and_say_so() -> None:
    heard = Heard()
    found = search(SMALL, LARGE).run(Limits(600.0), 0, heard)
    assert found.recording is None
    assert [note.split(":")[0] for note in found.notes[:2]] == ["small (2 pages)", "large (4 pages)"]
    assert all("closed at depth" in note for note in found.notes[:2])
    assert "new states a second" in found.notes[2]
    operations, states, note = heard.told[-1]
    assert (operations, states, note) == (found.operations, found.states, "large")
    assert found.operations > (found.states or 0) > 100


def test_depth_that_was_asked_for_ends_each_scope() -> None:
    found = run(search(SMALL, LARGE), depth=2)
    assert all("all sequences of 2 steps, then the depth asked for was reached" in n for n in found.notes[:2])
    deeper = run(search(SMALL, LARGE), depth=3)
    assert (deeper.states or 0) > (found.states or 0)


def test_time_that_is_up_ends_the_search() -> None:
    found = run(search(SMALL, LARGE), seconds=0.0)
    assert all("all sequences of 0 steps, then the time was up" in note for note in found.notes[:2])
    assert found.states == 2


def test_memory_that_is_used_up_is_not_called_a_closed_space() -> None:
    found = run(search(LARGE, max_bytes=1 << 17))
    assert "then the memory for states is used up" in found.notes[0]
    assert found.recording is None


@pytest.mark.parametrize("wrong", ["wrong_at", "bug_at"])
def test_violation_is_recorded_and_can_be_run_again(wrong: str) -> None:
    bad = replace(LARGE, setup=replace(LARGE.setup, **{wrong: 3}))
    what = search(SMALL, bad)
    found = run(what)
    assert found.recording is not None
    assert [step[0] for step in found.recording.steps] == ["alloc"] * 3
    assert found.found_after == found.operations
    assert "found something at depth 3" in found.notes[1]
    recording = Recording.from_json(found.recording.to_json())
    history = recording.violation.history
    if wrong == "bug_at":  # which is about page 1
        assert history[0] == "at boot: free"
        assert history[-1] == f"step 3, alloc 0 {recording.steps[2][2]}: so many single pages"
    else:
        assert history == ()
    assert recording.search == what.name
    assert what.replay(recording) == found.recording.violation
    assert what.replay(replace(recording, steps=recording.steps[:2])) is None
    # A step that is not possible is passed over.
    assert what.replay(replace(recording, steps=(["free", 3, 0], *recording.steps))) is not None


def test_number_of_pages_can_be_chosen_and_no_scope_is_searched_twice() -> None:
    same = replace(SMALL, name="same", setup=toy.Setup(pages=8))
    found = run(search(SMALL, same), pages=4, depth=1)
    assert [note.split(":")[0] for note in found.notes[:-1]] == ["small (4 pages)"]


def test_guest_that_is_too_large_to_be_gone_through_is_left_to_other_searches() -> None:
    found = run(search(SMALL), pages=1 << 16, depth=1)
    assert [note.split(":")[0] for note in found.notes[:-1]] == ["small (2 pages)"]


def test_real_guests_have_no_false_claim_within_a_few_steps() -> None:
    what_is_searched = (*SCOPES[:4], SCOPES[7])
    what = ExhaustiveSearch(what_is_searched)
    found = run(what, depth=2)
    assert found.recording is None
    assert len(found.notes) == len(what_is_searched) + 1
    assert found.rows["merge-one"] + found.rows["free-zeroed"] > 0


def test_scopes_are_guests_that_can_be_made_and_named() -> None:
    assert len({scope.name for scope in SCOPES}) == len(SCOPES)
    for scope in SCOPES:
        scope.setup.validate()
        assert scope.setup.pages in {16, 32}
        assert scope.about


def test_recording_of_another_guest_is_refused() -> None:
    document = {"pages": 3}
    violation = {"kind": "rot", "what": "nothing"}
    recording = Recording.from_json(
        {
            "format": "hostzero-check",
            "version": 1,
            "search": "exhaustive",
            "setup": document,
            "steps": [["drain"]],
            "violation": violation,
        }
    )
    with pytest.raises(UsageError):
        ExhaustiveSearch().replay(recording)
