# SPDX-License-Identifier: GPL-2.0-only
"""What a run measured: typed records, and the JSON document they are kept in.

The document, version 1::

    {"version": 1,
     "host": {...},                     what `hostzero.host.describe_host` returns
     "config": {...},                   the options; "disturbance_rule"
     "results": [                       one per scenario, arm and phase
       {"scenario": "thp", "arm": "baseline", "phase": "populate",
        "task_clock_ms": [...],         every list has one entry per repetition
        "wall_ms": [...],
        "host_faults": [...],           page faults that the host served in the phase
        "host_faulted_bytes": [...],    bytes the host backed in the phase, or null: not measured
        "guest_zeroed_bytes": [...],    written with zeros by the guest
        "known_zero_bytes": [...],      handed out unzeroed, because known to be zero
        "host_returned_bytes": [...],   given to the host before the phase
        "instructions": [...],          or null: this machine does not count them
        "cache_misses": [...],          or null
        "disturbed": [...]}],           booleans; see `hostzero.bench.disturbance`
     "comparisons": [                   of task_clock_ms, paired by repetition
       {"scenario": "thp", "phase": "populate", "arm": "optimized", "against": "baseline",
        "ratio": 0.03, "ci95": [0.02, 0.04], "n": 10,
        "undisturbed": {"ratio": 0.03, "ci95": [0.02, 0.04], "n": 9}}],
     "counts": [                        of scenarios that count: one per scenario and case
       {"scenario": "fragmented",
        "case": {"workload": "populate", "placement": "linux", ...},
        "values": {"order0_share": [...], ...}}]}   one entry per repetition; null: undefined

A reader ignores keys that it does not know; a change that breaks one raises the version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from hostzero.bench.counters import Sample
from hostzero.bench.disturbance import RULE, is_disturbed
from hostzero.bench.names import COMPARISONS, Arm, Phase, Scenario
from hostzero.errors import UsageError
from hostzero.stats import PairedRatio, paired_ratio

VERSION: Final = 1


class PageCounts(NamedTuple):
    """What the guest's counters say about one repetition of a phase, in bytes."""

    guest_zeroed: int
    known_zero: int
    host_returned: int
    host_faulted: int | None = None
    """Growth of `Ram.resident` over the phase; None where it was not measured."""

    def plus(self, other: PageCounts) -> PageCounts:
        """Return the counts of two stretches of one phase; what was returned before both is one."""
        both = self.host_faulted is not None and other.host_faulted is not None
        return PageCounts(
            self.guest_zeroed + other.guest_zeroed,
            self.known_zero + other.known_zero,
            self.host_returned,
            (self.host_faulted or 0) + (other.host_faulted or 0) if both else None,
        )


@dataclass(slots=True)
class Series:
    """All repetitions of one phase of one arm; every list has one entry per repetition."""

    scenario: Scenario
    arm: Arm
    phase: Phase
    task_clock_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    host_faults: list[int] = field(default_factory=list)
    host_faulted_bytes: list[int] | None = field(default_factory=list)
    guest_zeroed_bytes: list[int] = field(default_factory=list)
    known_zero_bytes: list[int] = field(default_factory=list)
    host_returned_bytes: list[int] = field(default_factory=list)
    instructions: list[int] | None = field(default_factory=list)
    cache_misses: list[int] | None = field(default_factory=list)
    disturbed: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of repetitions."""
        return len(self.task_clock_ms)

    def add(self, sample: Sample, pages: PageCounts) -> None:
        """Append one repetition; the rule of `disturbance` is applied here and nowhere else."""
        self.task_clock_ms.append(sample.task_clock_ms)
        self.wall_ms.append(sample.wall_ms)
        self.host_faults.append(sample.host_faults)
        self.host_faulted_bytes = _extended(self.host_faulted_bytes, pages.host_faulted)
        self.guest_zeroed_bytes.append(pages.guest_zeroed)
        self.known_zero_bytes.append(pages.known_zero)
        self.host_returned_bytes.append(pages.host_returned)
        self.instructions = _extended(self.instructions, sample.instructions)
        self.cache_misses = _extended(self.cache_misses, sample.cache_misses)
        self.disturbed.append(is_disturbed(wall_ms=sample.wall_ms, task_clock_ms=sample.task_clock_ms))

    def check(self) -> None:
        """Check that every list is as long as the others.

        Raises:
            UsageError: one is not; the text names it.
        """
        for column in dataclasses.fields(self):
            value = getattr(self, column.name)
            if isinstance(value, list) and len(value) != len(self):
                raise UsageError(
                    f"result {self.scenario}/{self.arm}/{self.phase}: {column.name} has {len(value)} entries "
                    f"for {len(self)} repetitions"
                )


@dataclass(slots=True)
class Counts:
    """All repetitions of one case of a scenario that counts; every list has one entry per repetition."""

    scenario: Scenario
    case: dict[str, str | float]
    """What makes this case: a value by name of the dimension."""
    values: dict[str, list[float | None]] = field(default_factory=dict)
    """What was counted, by name; None where it is undefined (a share of nothing)."""

    def __len__(self) -> int:
        """Return the number of repetitions."""
        return max(map(len, self.values.values()), default=0)

    def add(self, values: Mapping[str, float | None]) -> None:
        """Append one repetition."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def defined(self, name: str) -> list[float]:
        """Return the values of one name that are defined."""
        return [value for value in self.values[name] if value is not None]

    def check(self) -> None:
        """Check that every list is as long as the others.

        Raises:
            UsageError: one is not; the text names it.
        """
        for name, values in self.values.items():
            if len(values) != len(self):
                raise UsageError(
                    f"counts {self.scenario}/{self.case}: {name} has {len(values)} entries "
                    f"for {len(self)} repetitions"
                )


class Comparison(NamedTuple):
    """One arm divided by another, by task-clock."""

    scenario: Scenario
    phase: Phase
    arm: Arm
    against: Arm
    over_all: PairedRatio
    undisturbed: PairedRatio


@dataclass(slots=True)
class Results:
    """Everything one run measured."""

    host: Mapping[str, object]
    config: Mapping[str, object]
    series: list[Series] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)

    def counts_for(self, scenario: Scenario, case: Mapping[str, str | float]) -> Counts:
        """Return the counts of one case, making empty ones the first time."""
        for counts in self.counts:
            if counts.scenario == scenario and counts.case == case:
                return counts
        self.counts.append(Counts(scenario, dict(case)))
        return self.counts[-1]

    def counted_in(self, scenario: Scenario) -> list[Counts]:
        """Return one scenario's counts, in the order of their cases."""
        return [counts for counts in self.counts if counts.scenario == scenario]

    def counted_scenarios(self) -> list[Scenario]:
        """Return the scenarios that have counts, in the order they ran."""
        return list(dict.fromkeys(counts.scenario for counts in self.counts))

    def series_for(self, scenario: Scenario, arm: Arm, phase: Phase) -> Series:
        """Return the series of one cell, making an empty one the first time."""
        for series in self.series:
            if (series.scenario, series.arm, series.phase) == (scenario, arm, phase):
                return series
        self.series.append(Series(scenario, arm, phase))
        return self.series[-1]

    def scenarios(self) -> list[Scenario]:
        """Return the scenarios that have times, in the order they ran."""
        return list(dict.fromkeys(series.scenario for series in self.series))

    def in_scenario(self, scenario: Scenario) -> list[Series]:
        """Return one scenario's series, by phase and then by arm, each in its declared order."""
        phases, arms = list(Phase), list(Arm)
        return sorted(
            (series for series in self.series if series.scenario == scenario and len(series)),
            key=lambda series: (phases.index(series.phase), arms.index(series.arm)),
        )

    def comparisons(self) -> list[Comparison]:
        """Return every comparison of `names.COMPARISONS` that has both arms."""
        return [comparison for scenario in self.scenarios() for comparison in self._compare(scenario)]

    def _compare(self, scenario: Scenario) -> Iterator[Comparison]:
        cells = {(series.phase, series.arm): series for series in self.in_scenario(scenario)}
        for phase in Phase:
            for arm, against in COMPARISONS:
                one, other = cells.get((phase, arm)), cells.get((phase, against))
                if one is not None and other is not None:
                    yield Comparison(scenario, phase, arm, against, *_ratios(one, other))

    def to_document(self) -> dict[str, Any]:
        """Return the JSON document of this module's docstring."""
        return {
            "version": VERSION,
            "host": dict(self.host),
            "config": {**self.config, "disturbance_rule": RULE},
            "results": [_series_to_json(series) for series in self.series],
            "comparisons": [_comparison_to_json(comparison) for comparison in self.comparisons()],
            "counts": [
                {"scenario": str(one.scenario), "case": dict(one.case), "values": dict(one.values)}
                for one in self.counts
            ],
        }

    @classmethod
    def from_document(cls, document: object) -> Results:
        """Read a document back; comparisons are computed anew.

        Raises:
            UsageError: it is no document of this version, or its lists do not fit together.
        """
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise UsageError(f"not a benchmark document of version {VERSION}")
        try:
            series = [_series_from_json(entry) for entry in document["results"]]
            # Documents from before there were scenarios that count have none.
            counts = [
                Counts(Scenario(one["scenario"]), dict(one["case"]), {**one["values"]})
                for one in document.get("counts", [])
            ]
            results = cls(
                host=dict(document["host"]), config=dict(document["config"]), series=series, counts=counts
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a benchmark document: {error!r}") from error
        for one in series:
            one.check()
        for counted in counts:
            counted.check()
        return results


@dataclass(frozen=True, slots=True)
class AllocatorResults:
    """What the allocator alone costs: nanoseconds per operation, one entry per repetition.

    The control share is the part of a baseline populate that is not memset: 0.4 means
    that 40 % of the time goes to finding pages, whoever zeroes them.
    """

    order0_alloc_ns: Sequence[float]
    order0_free_ns: Sequence[float]
    order9_alloc_ns: Sequence[float]
    order9_free_ns: Sequence[float]
    memset_4k_ns: Sequence[float]
    control_share_order0: Sequence[float]
    control_share_order9: Sequence[float]
    host: Mapping[str, object] = field(default_factory=dict)

    def columns(self) -> dict[str, list[float]]:
        """Return the measured lists by name."""
        return {
            column.name: [float(value) for value in getattr(self, column.name)]
            for column in dataclasses.fields(self)
            if column.name != "host"
        }

    def to_document(self) -> dict[str, Any]:
        """Return the JSON document of ``--allocator``: one list per column, version and host beside."""
        return {"version": VERSION, "host": dict(self.host), **self.columns()}


def _extended(values: list[int] | None, value: int | None) -> list[int] | None:
    # One repetition without the value and the column is not available: half a column misleads.
    if values is None or value is None:
        return None
    values.append(value)
    return values


def _ratios(one: Series, other: Series) -> tuple[PairedRatio, PairedRatio]:
    pairs = list(zip(one.task_clock_ms, other.task_clock_ms, one.disturbed, other.disturbed, strict=False))
    quiet = [pair for pair in pairs if not (pair[2] or pair[3])]
    return (
        paired_ratio([pair[0] for pair in pairs], [pair[1] for pair in pairs]),
        paired_ratio([pair[0] for pair in quiet], [pair[1] for pair in quiet]),
    )


def _series_to_json(series: Series) -> dict[str, Any]:
    record = dataclasses.asdict(series)
    return {
        key: str(value) if key in {"scenario", "arm", "phase"} else value for key, value in record.items()
    }


def _series_from_json(entry: Mapping[str, Any]) -> Series:
    known = {column.name for column in dataclasses.fields(Series)}
    record = {key: value for key, value in entry.items() if key in known}
    missing = known - record.keys()
    if missing:
        raise KeyError(*sorted(missing))
    record["scenario"] = Scenario(record["scenario"])
    record["arm"] = Arm(record["arm"])
    record["phase"] = Phase(record["phase"])
    return Series(**record)


def _ratio_to_json(ratio: PairedRatio) -> dict[str, Any]:
    return {
        "ratio": ratio.ratio,
        "ci95": None if ratio.ci95 is None else list(ratio.ci95),
        "n": ratio.n,
        "zeros": ratio.zeros,
    }


def _comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "scenario": str(comparison.scenario),
        "phase": str(comparison.phase),
        "arm": str(comparison.arm),
        "against": str(comparison.against),
        **_ratio_to_json(comparison.over_all),
        "undisturbed": _ratio_to_json(comparison.undisturbed),
    }
