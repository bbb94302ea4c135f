# SPDX-License-Identifier: GPL-2.0-only
"""Searches that are played: they say and find what a test wants, and no time passes."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from hostzero.check.recording import Recording
from hostzero.check.run import SEARCHES
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.violation import Violation

VIOLATION = Violation(
    kind="corruption",
    what="a block known to be zero is not",
    pfn=0x40,
    order=3,
    where="free list of zone 0, order 3, movable",
    claim="PG_zeroed, set by the drain",
    wrong_offset=0x1008,
    wrong_value=0xAA,
    history=("12: allocated, order 0, CPU 1", "13: written", "14: freed"),
)


def recording_of(name: str, violation: Violation = VIOLATION) -> Recording:
    return Recording(name, {"pages": 64}, (["alloc", 0, 1], ["write", 64], ["free", 64]), violation)


class Clock:
    """Goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Part:
    """What one search does when it is run."""

    takes: float | None = None
    """Seconds; None: all that it is given."""
    operations: int = 1000
    states: int | None = None
    rows: Counter[str] = field(default_factory=lambda: Counter({"split": 5}))
    notes: list[str] = field(default_factory=list)
    recording: Recording | None = None
    replays: Violation | None = None
    error: BaseException | None = None
    """Raised after half of the work has been said."""
    prepare_error: BaseException | None = None


class Played:
    """Stands for the modules of the searches, and notes what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.parts = {name: Part() for name in SEARCHES}
        self.asked: list[tuple[str, Limits, int]] = []
        self.prepared: list[str] = []
        self.replayed: list[Recording] = []
        for name, registered in SEARCHES.items():
            module = types.ModuleType(registered.module)
            played = self._search_named(name)
            played.__module__ = registered.module
            module.PlayedSearch = played  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, registered.module, module)

    def _search_named(self, search_name: str) -> type:
        outer = self

        class PlayedSearch:
            name = search_name
            title = f"the {search_name} search"

            def prepare(self) -> None:
                outer.clock.now += 100
                outer.prepared.append(self.name)
                if error := outer.parts[self.name].prepare_error:
                    raise error

            def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
                return outer.run(self.name, limits, seed, progress)

            def replay(self, recording: Recording) -> Violation | None:
                outer.replayed.append(recording)
                return outer.parts[self.name].replays

        return PlayedSearch

    def run(self, name: str, limits: Limits, seed: int, progress: Progress) -> Findings:
        self.asked.append((name, limits, seed))
        part = self.parts[name]
        seconds = limits.seconds if part.takes is None else part.takes
        half = Counter({row: count // 2 for row, count in part.rows.items()})
        self.clock.now += seconds / 2
        progress(part.operations // 2, None if part.states is None else part.states // 2, half, "half way")
        if part.error is not None:
            raise part.error
        self.clock.now += seconds / 2
        progress(part.operations, part.states, part.rows)
        found = part.recording
        return Findings(
            name,
            seconds,
            part.operations,
            part.states,
            part.rows,
            part.notes,
            found,
            found_after=None if found is None else part.operations,
        )


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


Change = Callable[[dict[str, Any]], object]
"""What a test does to a document, to see that it is refused."""
