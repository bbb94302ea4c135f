# SPDX-License-Identifier: GPL-2.0-only
"""How a case judges: what it expects, how strictly, and what was sent and came back.

Three levels are kept apart, so that a device is never blamed for what no text asks of it:

=========  =====================================================================================
level      the expectation
=========  =====================================================================================
must       the specification, or the proposal for bits 6 and 7, says MUST, or describes it as the
           one way in which the request works
safety     a driver that breaks the rules must not get at memory that it did not name, nor take
           the device down; no clause says it, every user relies on it
should     the specification says SHOULD, or users count on it; missing it is reported, and fails
           only a strict run
=========  =====================================================================================
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, NoReturn

TRANSCRIPT_LINES: Final = 60
"""Lines that a transcript keeps; a flood of requests must not become a flood of memory."""


class Level(enum.Enum):
    """How strictly an expectation is meant."""

    MUST = "must"
    SAFETY = "safety"
    SHOULD = "should"


@dataclass(frozen=True)
class Miss:
    """One expectation that did not hold.

    Attributes:
        level: how strictly it is meant.
        clause: where it stands.
        text: what was seen instead, as a sentence.
    """

    level: Level
    clause: str
    text: str


class Failed(Exception):
    """Ends a case at an expectation that must hold and does not; no error of the suite."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.text)
        self.miss = miss


class NotApplicable(Exception):
    """Ends a case that says nothing about this device; the text is the reason."""


@dataclass
class Transcript:
    """What was sent and what came back, in order, as lines for people."""

    lines: list[str] = field(default_factory=list)
    _left_out: int = 0

    def sent(self, text: str) -> None:
        """Note what the driver or the host did."""
        self._add(f"-> {text}")

    def came(self, text: str) -> None:
        """Note what the device did."""
        self._add(f"<- {text}")

    def as_lines(self) -> list[str]:
        """Return the lines; if some were left out, a line says how many."""
        if not self._left_out:
            return list(self.lines)
        half = TRANSCRIPT_LINES // 2
        return [*self.lines[:half], f".. {self._left_out} lines", *self.lines[half:]]

    # The start tells how the device was set up, the end what went wrong.
    def _add(self, line: str) -> None:
        if len(self.lines) >= TRANSCRIPT_LINES:
            del self.lines[TRANSCRIPT_LINES // 2]
            self._left_out += 1
        self.lines.append(line)


class Judge:
    """Takes a case's expectations.

    Attributes:
        clause: the clause of the case, for expectations that name no other.
        misses: expectations of the level `should` that did not hold so far.
        transcript: what was sent and what came back.
    """

    def __init__(self, clause: str) -> None:
        """Judge by `clause` unless an expectation names another."""
        self.clause = clause
        self.misses: list[Miss] = []
        self.transcript = Transcript()

    def must(self, holds: bool, text: str, clause: str | None = None) -> None:
        """End the case as failed unless `holds`; `text` says what was seen.

        Raises:
            Failed: it does not hold.
        """
        if not holds:
            self.fail(text, clause)

    def safe(self, holds: bool, text: str, clause: str | None = None) -> None:
        """As `must`, for what a hostile driver must not be able to do.

        Raises:
            Failed: it does not hold.
        """
        if not holds:
            raise Failed(Miss(Level.SAFETY, clause or self.clause, text))

    def should(self, holds: bool, text: str, clause: str | None = None) -> bool:
        """Note it unless `holds`, and go on; return `holds`."""
        if not holds:
            miss = Miss(Level.SHOULD, clause or self.clause, text)
            if miss not in self.misses:
                self.misses.append(miss)
        return holds

    def fail(self, text: str, clause: str | None = None) -> NoReturn:
        """End the case as failed.

        Raises:
            Failed: always.
        """
        raise Failed(Miss(Level.MUST, clause or self.clause, text))
