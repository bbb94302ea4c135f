# SPDX-License-Identifier: GPL-2.0-only
"""A violation says what is known and nothing else, and survives being written and read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hostzero.check.violation import KINDS, Violated, Violation
from hostzero.errors import HostzeroError
from tests.check.played import VIOLATION


def test_all_that_is_known_is_said() -> None:
    assert VIOLATION.lines() == [
        "corruption: a block known to be zero is not",
        "  page   0x40 in a block of order 3",
        "  on     free list of zone 0, order 3, movable",
        "  claim  PG_zeroed, set by the drain",
        "  byte   0x1008 is 0xaa",
        "  events of this page, the oldest first",
        "    12: allocated, order 0, CPU 1",
        "    13: written",
        "    14: freed",
    ]


def test_what_is_not_known_is_not_said() -> None:
    assert Violation("rot", "counters drift").lines() == ["rot: counters drift"]
    assert Violation("lost", "zeroed again", pfn=0).lines() == ["lost: zeroed again", "  page   0x0"]
    assert Violation("rot", "r", wrong_offset=0).lines()[1:] == ["  byte   0x0"]
    assert Violation("rot", "r", wrong_offset=4, wrong_value=0).lines()[1:] == ["  byte   0x4 is 0x00"]


@pytest.mark.parametrize("violation", [VIOLATION, Violation("lost", "zeroed again")])
def test_it_survives_json(violation: Violation) -> None:
    assert Violation.from_json(json.loads(json.dumps(violation.to_json()))) == violation


@pytest.mark.parametrize(
    "change",
    [{"kind": "guess"}, {"kind": None}, {"colour": "red"}],
    ids=["another kind", "no kind", "a field too many"],
)
def test_something_else_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Violation.from_json(VIOLATION.to_json() | change)


def test_without_its_sentence_it_is_refused() -> None:
    fields = VIOLATION.to_json()
    del fields["what"]
    with pytest.raises(TypeError):
        Violation.from_json(fields)


def test_events_can_be_added_later() -> None:
    bare = replace(VIOLATION, history=())
    assert bare.with_history(VIOLATION.history) == VIOLATION


def test_the_exception_is_one_of_the_tree_and_has_the_violation() -> None:
    error = Violated(VIOLATION)
    assert isinstance(error, HostzeroError)
    assert str(error) == VIOLATION.what
    assert error.violation is VIOLATION


def test_every_kind_is_explained() -> None:
    assert set(KINDS) == {"corruption", "rot", "lost"}
    assert all(KINDS.values())
