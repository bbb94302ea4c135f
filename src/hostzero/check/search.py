# SPDX-License-Identifier: GPL-2.0-only
"""What all searches have in common: limits in, findings out, progress in between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from hostzero.check.recording import Recording
from hostzero.check.violation import Violation


@dataclass(frozen=True)
class Limits:
    """How far a search may go.

    Attributes:
        seconds: how long it may take; it may end before.
        pages: the guest's pages, for searches that can choose.
        depth: how many steps deep the exhaustive search goes; None: until the time is up.
    """

    seconds: float
    pages: int | None = None
    depth: int | None = None


class Progress(Protocol):
    """Hears how far a search has come, several times a second."""

    def __call__(self, operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
        """Say what has been done since the search began."""


@dataclass
class Findings:
    """What a search did and found.

    Attributes:
        search: its name.
        seconds: how long it took, compiling left out.
        operations: how many steps were done and checked.
        states: how many different states were visited, where states are recognised.
        rows: how often each row of the lifecycle table was exercised, by the row's id.
        notes: what else there is to say, a line each: rates, what was closed, what was left out.
        recording: what was found, shrunk; None if nothing was.
        found_after: the steps that had been done when it was found, before shrinking.
    """

    search: str
    seconds: float = 0.0
    operations: int = 0
    states: int | None = None
    rows: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    recording: Recording | None = None
    found_after: int | None = None


class Search(Protocol):
    """One way to look for a false claim."""

    name: str
    title: str

    def prepare(self) -> None:
        """Compile what is needed, so that the time is spent on the search."""

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Search until something is found, everything has been seen, or the time is up."""

    def replay(self, recording: Recording) -> Violation | None:
        """Run a recording again; return what is found, or None.

        Raises:
            UsageError: the recording's setup or steps are none of this search's.
        """
