# SPDX-License-Identifier: GPL-2.0-only
"""A run shares its time, ends at the first violation, and reports what was done however it ends."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hostzero.check.lifecycle import ROW_IDS
from hostzero.check.recording import Recording
from hostzero.check.run import (
    SEARCHES,
    CheckOptions,
    Report,
    free_name,
    load_search,
    replay,
    run_check,
    save_recording,
)
from hostzero.check.search import Findings
from hostzero.errors import UsageError
from tests.check.played import VIOLATION, Played, recording_of


class Heard:
    """Notes what a watcher is told."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def prepare(self, name: str, title: str) -> None:
        self.said.append(("prepare", name, title))

    def begin(self, name: str, title: str, seconds: float) -> None:
        self.said.append(("begin", name, round(seconds, 6)))

    def moved(
        self, name: str, operations: int, states: int | None, rows: Counter[str], note: str = ""
    ) -> None:
        self.said.append(("moved", name, operations, states, rows.total(), note))

    def end(self, findings: Findings) -> None:
        self.said.append(("end", findings.search, findings.operations))


def run(played: Played, **options: object) -> tuple[Report, Heard]:
    heard = Heard()
    values = {"seed": 7, **options}
    return run_check(CheckOptions(**values), heard, played.clock), heard  # type: ignore[arg-type]


def seconds_given(played: Played) -> dict[str, float]:
    return {name: round(limits.seconds, 6) for name, limits, _ in played.asked}


def test_the_searches_share_the_time(played: Played) -> None:
    report, _ = run(played)
    assert seconds_given(played) == {"allocator": 12, "exhaustive": 12, "machine": 24, "wire": 12}
    assert report.seconds == pytest.approx(60)
    assert report.ok


def test_a_search_that_ends_early_leaves_its_rest_to_those_after_it(played: Played) -> None:
    played.parts["exhaustive"].takes = 3
    run(played)
    assert seconds_given(played) == {"allocator": 12, "exhaustive": 12, "machine": 30, "wire": 15}


def test_a_search_that_overdraws_leaves_the_others_a_little(played: Played) -> None:
    played.parts["allocator"].takes = 1000
    run(played)
    assert seconds_given(played) == {"allocator": 12, "exhaustive": 1.2, "machine": 2.4, "wire": 1.2}


def test_chosen_searches_share_all_of_it_in_the_usual_order(played: Played) -> None:
    run(played, searches=("wire", "allocator"), pages=32, depth=4)
    assert seconds_given(played) == {"allocator": 30, "wire": 30}
    assert {(limits.pages, limits.depth, seed) for _, limits, seed in played.asked} == {(32, 4, 7)}


def test_preparing_is_not_in_the_time(played: Played) -> None:
    report, heard = run(played, searches=("machine",))
    assert seconds_given(played) == {"machine": 60}
    assert report.seconds == 60
    assert heard.said[:2] == [("prepare", "machine", "the machine search"), ("begin", "machine", 60)]


def test_a_watcher_hears_everything_in_order(played: Played) -> None:
    played.parts["wire"].states = 10
    _, heard = run(played, searches=("wire",))
    assert heard.said[2:] == [
        ("moved", "wire", 500, 5, 2, "half way"),
        ("moved", "wire", 1000, 10, 5, ""),
        ("end", "wire", 1000),
    ]


def test_the_first_violation_ends_the_run(played: Played) -> None:
    played.parts["exhaustive"].recording = recording_of("exhaustive")
    report, _ = run(played)
    assert [name for name, _, _ in played.asked] == played.prepared == ["allocator", "exhaustive"]
    assert not report.ok
    assert report.recording == recording_of("exhaustive")


@pytest.mark.parametrize("while_preparing", [False, True])
def test_an_interrupt_leaves_a_report_of_what_was_said_until_then(
    played: Played, while_preparing: bool
) -> None:
    if while_preparing:
        played.parts["exhaustive"].prepare_error = KeyboardInterrupt()
    else:
        played.parts["exhaustive"].error = KeyboardInterrupt()
    report, heard = run(played)
    assert report.interrupted
    assert report.ok
    (_, whole), (title, half) = report.searches
    assert whole.operations == 1000
    assert (title, half.operations) == ("the exhaustive search", 0 if while_preparing else 500)
    assert half.seconds == pytest.approx(0 if while_preparing else 6)
    assert heard.said[-1] == ("end", "exhaustive", half.operations)


def test_a_defect_of_a_search_is_not_swallowed(played: Played) -> None:
    played.parts["allocator"].error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        run(played)


def test_a_row_that_the_table_lacks_is_a_defect(played: Played) -> None:
    played.parts["allocator"].rows = Counter({"split": 4, "spilt": 2})
    with pytest.raises(ValueError, match=r"allocator counts rows .* \['spilt'\]"):
        run(played)


def test_coverage_is_summed_over_the_searches_and_has_every_row(played: Played) -> None:
    played.parts["wire"].rows = Counter({"alloc": 3, "split": 1})
    report, _ = run(played)
    assert list(report.coverage) == list(ROW_IDS)
    assert {name: count for name, count in report.coverage.items() if count} == {"split": 16, "alloc": 3}


def test_the_report_as_a_document(played: Played, tmp_path: Path) -> None:
    played.parts["exhaustive"].recording = recording_of("exhaustive")
    played.parts["exhaustive"].states = 400
    played.parts["exhaustive"].notes = ["closed"]
    report, _ = run(played)
    save_recording(report, tmp_path / "found.json")
    document = json.loads(json.dumps(report.to_json()))
    assert {name: value for name, value in document.items() if name not in {"searches", "coverage"}} == {
        "format": "hostzero-check-report",
        "version": 1,
        "seed": 7,
        "seconds": 24,
        "ok": False,
        "recording_file": str(tmp_path / "found.json"),
    }
    first, second = document["searches"]
    assert first["recording"] is first["states"] is first["found_after"] is None
    assert Recording.from_json(second.pop("recording")) == recording_of("exhaustive")
    assert second == {
        "name": "exhaustive",
        "title": "the exhaustive search",
        "seconds": 12,
        "operations": 1000,
        "states": 400,
        "found_after": 1000,
        "notes": ["closed"],
        "rows": {"split": 5},
    }


def test_counts_from_arrays_are_numbers_in_the_document(played: Played) -> None:
    part = played.parts["wire"]
    part.operations, part.states = np.int64(7), np.int64(8)  # type: ignore[assignment]
    part.rows = Counter({"split": np.int64(9)})
    report, _ = run(played, searches=("wire",))
    document = json.loads(json.dumps(report.to_json()))
    assert document["coverage"]["split"] == document["searches"][0]["rows"]["split"] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "--seconds 0: must be above zero"),
        ({"seconds": float("nan")}, "--seconds nan: must be above zero"),
        ({"seconds": float("inf")}, "--seconds inf: must be above zero"),
        ({"seed": -1}, "--seed -1: must be from 0 to 4294967295"),
        ({"seed": 1 << 32}, "--seed 4294967296: must be from 0 to 4294967295"),
        ({"pages": 15}, "--pages 15: must be from 16 to 1048576"),
        ({"depth": 0}, "--depth 0: must be at least 1"),
        ({"searches": ("wine",)}, "--search wine: unknown; there are allocator, exhaustive, machine, wire"),
        ({"searches": ()}, "--search: name at least one of allocator, exhaustive, machine, wire"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    values = {"seed": 1, **options}
    with pytest.raises(UsageError) as caught:
        CheckOptions(**values).validate()  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_defaults_fit() -> None:
    CheckOptions(seed=0).validate()


def test_every_search_has_a_share() -> None:
    assert all(search.share > 0 for search in SEARCHES.values())
    assert sum(search.share for search in SEARCHES.values()) == 100


def test_a_module_without_its_search_is_named(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    name = SEARCHES["wire"].module
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"hostzero.check.wire.search has no search named 'wire'"):
        load_search("wire")


def test_a_search_that_a_module_only_imports_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, played: Played
) -> None:
    name = SEARCHES["wire"].module
    module = types.ModuleType(name)
    module.Imported = type("Imported", (), {"name": "wire", "__module__": "elsewhere"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError):
        load_search("wire")


def test_a_recording_goes_to_the_search_that_made_it(played: Played) -> None:
    played.parts["machine"].replays = VIOLATION
    assert replay(recording_of("machine")) == VIOLATION
    assert played.replayed == [recording_of("machine")]
    assert played.prepared == ["machine"]
    assert replay(recording_of("wire")) is None


def test_a_recording_of_no_search_there_is(played: Played) -> None:
    with pytest.raises(UsageError, match="there is no search 'dowsing'; there are allocator,"):
        replay(recording_of("dowsing"))


def test_a_free_name_is_the_name_or_one_with_a_number(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert free_name(path) == path
    path.touch()
    assert free_name(path) == tmp_path / "found-2.json"
    (tmp_path / "found-2.json").touch()
    assert free_name(path) == tmp_path / "found-3.json"


def test_a_report_without_a_violation_saves_nothing(played: Played, tmp_path: Path) -> None:
    report, _ = run(played)
    save_recording(report, tmp_path / "found.json")
    assert report.recording_file is None
    assert list(tmp_path.iterdir()) == []
