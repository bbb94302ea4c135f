# SPDX-License-Identifier: GPL-2.0-only
"""One run of the searches: who searches, in which order, for how long, and what came of it.

The searches share the time. One that ends early, because it has seen everything, leaves the rest
of its share to those after it. The first violation ends the run.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from hostzero.check.lifecycle import ROW_IDS, unknown_rows
from hostzero.check.recording import Recording
from hostzero.check.search import Findings, Limits, Search
from hostzero.check.violation import Violation
from hostzero.errors import UsageError

FORMAT: Final = "hostzero-check-report"
VERSION: Final = 1

LARGEST_SEED: Final = (1 << 32) - 1
LEAST_PAGES: Final = 16
MOST_PAGES: Final = 1 << 20

_LEAST_PART: Final = 0.1
"""A search gets at least this part of its share, if those before it have overdrawn theirs."""


class Registered(NamedTuple):
    """Where a search lives, and its share of the time."""

    module: str
    share: int


SEARCHES: Final = {
    "allocator": Registered("hostzero.check.small.allocator", 20),
    "exhaustive": Registered("hostzero.check.small.exhaustive", 20),
    "machine": Registered("hostzero.check.machine", 40),
    "wire": Registered("hostzero.check.wire.search", 20),
}
"""Every search in the order in which they run: the quickest to find something first.

What one of the first two can find, it finds early; what only `machine` sees is a matter of its time.
"""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """One run of ``hostzero check``. `validate` must have passed before it is used."""

    seed: int
    seconds: float = 60.0
    """The time that the searches share; compiling comes on top."""
    pages: int | None = None
    depth: int | None = None
    searches: tuple[str, ...] = tuple(SEARCHES)

    def validate(self) -> None:
        """Check the options.

        Raises:
            UsageError: an option does not fit; the text names it and what would fit.
        """
        if not 0 < self.seconds < float("inf"):
            raise UsageError(f"--seconds {self.seconds:g}: must be above zero")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"--seed {self.seed}: must be from 0 to {LARGEST_SEED}")
        if self.pages is not None and not LEAST_PAGES <= self.pages <= MOST_PAGES:
            raise UsageError(f"--pages {self.pages}: must be from {LEAST_PAGES} to {MOST_PAGES}")
        if self.depth is not None and self.depth < 1:
            raise UsageError(f"--depth {self.depth}: must be at least 1")
        for name in self.searches:
            if name not in SEARCHES:
                raise UsageError(f"--search {name}: unknown; there are {', '.join(SEARCHES)}")
        if not self.searches:
            raise UsageError("--search: name at least one of " + ", ".join(SEARCHES))


class Watcher(Protocol):
    """Hears how far a run has come."""

    def prepare(self, name: str, title: str) -> None:
        """A search is made ready, which may mean compiling it."""

    def begin(self, name: str, title: str, seconds: float) -> None:
        """A search begins; it may take `seconds`."""

    def moved(
        self, name: str, operations: int, states: int | None, rows: Counter[str], note: str = ""
    ) -> None:
        """A search says what it has done since it began."""

    def end(self, findings: Findings) -> None:
        """A search has ended, or was interrupted."""


@dataclass
class Report:
    """What a run did and found.

    Attributes:
        options: what was asked for.
        searches: the findings of each search that ran, with its title.
        interrupted: the user ended it; the last search has only what it had said until then.
        recording_file: where the recording of the violation was saved.
    """

    options: CheckOptions
    searches: list[tuple[str, Findings]] = field(default_factory=list)
    interrupted: bool = False
    recording_file: Path | None = None

    @property
    def recording(self) -> Recording | None:
        """What was found, if anything was."""
        return next((f.recording for _, f in self.searches if f.recording is not None), None)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.recording is None

    @property
    def seconds(self) -> float:
        """How long the searches took together."""
        return sum(findings.seconds for _, findings in self.searches)

    @property
    def coverage(self) -> dict[str, int]:
        """How often each row of the lifecycle table was exercised, all rows in their order."""
        total: Counter[str] = Counter()
        for _, findings in self.searches:
            total.update(findings.rows)
        return {name: int(total[name]) for name in ROW_IDS}

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "seed": self.options.seed,
            "seconds": self.seconds,
            "ok": self.ok,
            "searches": [_findings_to_json(title, findings) for title, findings in self.searches],
            "coverage": self.coverage,
            "recording_file": None if self.recording_file is None else str(self.recording_file),
        }


def _findings_to_json(title: str, findings: Findings) -> dict[str, Any]:
    return {
        "name": findings.search,
        "title": title,
        "seconds": float(findings.seconds),
        "operations": int(findings.operations),
        "states": _int(findings.states),
        "found_after": _int(findings.found_after),
        "notes": list(findings.notes),
        "rows": {name: int(findings.rows[name]) for name in ROW_IDS if findings.rows[name]},
        "recording": None if findings.recording is None else findings.recording.to_json(),
    }


def _int(number: int | None) -> int | None:
    # Searches count in arrays, and JSON knows no numbers of those.
    return None if number is None else int(number)


def load_search(name: str) -> Search:
    """Import a search's module and make the search: the class in it that has this name.

    Raises:
        ImportError: there is no such module, or no such class in it.
    """
    module = importlib.import_module(SEARCHES[name].module)
    for value in vars(module).values():
        # A class that is only imported there belongs to another module.
        here = isinstance(value, type) and value.__module__ == module.__name__
        if here and vars(value).get("name") == name:
            search: Search = value()
            return search
    raise ImportError(f"{module.__name__} has no search named {name!r}")


def run_check(
    options: CheckOptions, watcher: Watcher, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """Search until something is found, everything has been seen, the time is up or the user ends it.

    A Ctrl-C ends the run with a report of what was done until then.

    Raises:
        UsageError: a search cannot do with the limits given.
        ImportError: a search is missing.
    """
    report = Report(options)
    names = [name for name in SEARCHES if name in options.searches]
    left = options.seconds
    for index, name in enumerate(names):
        seconds = _share_of(names[index:], left, options.seconds)
        run = _Run(name, options, watcher, clock)
        try:
            run.prepare()
            findings = run.search(seconds)
        except KeyboardInterrupt:
            report.interrupted = True
            findings = run.so_far()
        left -= findings.seconds
        report.searches.append((run.title, findings))
        watcher.end(findings)
        if report.interrupted or findings.recording is not None:
            break
    return report


def _share_of(names: Sequence[str], left: float, whole: float) -> float:
    """Return the seconds of the first of `names`, which are those that have not run yet."""
    share = SEARCHES[names[0]].share
    least = _LEAST_PART * whole * share / sum(search.share for search in SEARCHES.values())
    return max(left * share / sum(SEARCHES[name].share for name in names), least)


class _Run:
    """One search of a run: keeps what it says of itself, for the case that it does not end."""

    def __init__(
        self, name: str, options: CheckOptions, watcher: Watcher, clock: Callable[[], float]
    ) -> None:
        self.title = name
        self._name = name
        self._options = options
        self._watcher = watcher
        self._clock = clock
        self._search: Search | None = None
        self._last = Findings(name)
        self._began: float | None = None

    def prepare(self) -> None:
        """Import and compile the search; its time has not begun."""
        self._search = load_search(self._name)
        self.title = self._search.title
        self._watcher.prepare(self._name, self.title)
        self._search.prepare()

    def search(self, seconds: float) -> Findings:
        """Run the search."""
        assert self._search is not None
        limits = Limits(seconds, self._options.pages, self._options.depth)
        self._watcher.begin(self._name, self.title, seconds)
        self._began = self._clock()
        findings = self._search.run(limits, self._options.seed, self._moved)
        self._check_rows(findings.rows)
        return findings

    def so_far(self) -> Findings:
        """Return what the search has said until it was interrupted."""
        if self._began is not None:
            self._last.seconds = self._clock() - self._began
        self._last.notes.append("interrupted")
        return self._last

    def _moved(self, operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
        self._check_rows(rows)
        self._last.operations = operations
        self._last.states = states
        self._last.rows = Counter(rows)
        self._watcher.moved(self._name, operations, states, rows, note)

    def _check_rows(self, rows: Counter[str]) -> None:
        # A count under a name that no row has would be seen by nobody.
        if unknown := unknown_rows(rows):
            raise ValueError(f"the search {self._name} counts rows that are not in the table: {unknown}")


def replay(recording: Recording) -> Violation | None:
    """Run a recording again by the search that made it; return what is found, or None.

    Raises:
        UsageError: no search of that name, or the recording is none of that search's.
    """
    if recording.search not in SEARCHES:
        raise UsageError(f"there is no search {recording.search!r}; there are {', '.join(SEARCHES)}")
    search = load_search(recording.search)
    search.prepare()
    return search.replay(recording)


def free_name(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... of which there is none yet."""
    candidate = path
    number = 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def save_recording(report: Report, path: Path) -> None:
    """Save what was found under `path`, or a free name like it; nothing is ever overwritten.

    Raises:
        UsageError: the file cannot be written.
    """
    if report.recording is not None:
        path = free_name(path)
        report.recording.save(path)
        report.recording_file = path
