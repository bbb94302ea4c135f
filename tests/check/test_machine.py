# SPDX-License-Identifier: GPL-2.0-only
"""The search `machine`: what it finds it can find again, and on the unchanged guest it finds nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostzero.check import machine
from hostzero.check.inventory import FREE
from hostzero.check.machine import END, MachineSearch, run_steps, shrink
from hostzero.check.machine_ops import OPERATIONS, Operation, load_operations
from hostzero.check.recording import Recording
from hostzero.check.search import Limits
from hostzero.check.violation import Violation
from hostzero.check.world import World
from hostzero.check.world_setup import plain_setup
from hostzero.errors import UsageError
from hostzero.mm.page_flags import PG_zeroed

load_operations()

KEPT = {"flush", "balloon", "drain", "host_fails", "resize_pool", "mmap_huge", "populate", "touch"}
NOTHING = Violation("rot", "nothing")


def silent(operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
    """Hear the progress and say nothing."""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation that sets a mark by hand."""

    def invent(world: World, at: int) -> None:
        assert world.before is not None
        pages = world.before.pages
        dirty = np.flatnonzero((pages.place == FREE) & ~pages.zeroed)
        if not len(dirty):
            return
        pfn = int(dirty[at % len(dirty)])
        world.mem.mem_map[int(pages.head[pfn])].flags_f |= PG_zeroed

    always = lambda world: True  # noqa: E731
    operation = Operation("invent", invent, ("at",), (255,), isolates=False, weight=6, when=always)
    for name in OPERATIONS.keys() - KEPT:
        monkeypatch.delitem(OPERATIONS, name)
    monkeypatch.setitem(OPERATIONS, "invent", operation)
    return "invent"


def test_a_false_claim_is_found_and_made_short(planted: str, caplog: pytest.LogCaptureFixture) -> None:
    steps: list[list[Any]] = [["balloon", 1], ["host_fails", 3, 3, 3], ["flush", 0], ["invent", 9], ["drain"]]
    violation, done = run_steps(plain_setup(features=5), steps, close=True)
    assert violation is not None
    assert done == 4
    recording, note = shrink(plain_setup(features=5), steps[:done], violation)
    assert recording.steps == (["invent", 0],)
    assert "from 4 steps to 1" in note
    assert recording.setup["features"] == 0
    # That a host fails is no news here, also while the steps are made fewer.
    assert caplog.messages == []


def test_the_search_finds_it_and_a_file_finds_it_again(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SHRINK_SECONDS", 2.0)
    search = MachineSearch()
    findings = search.run(Limits(300.0), 7, silent)
    recording = findings.recording
    assert recording is not None
    assert findings.found_after == findings.operations > 0
    assert recording.steps[-1][0] == planted
    recording.save(tmp_path / "found.json")
    again = Recording.load(tmp_path / "found.json")
    assert again == recording
    violation = search.replay(again)
    assert violation is not None
    assert violation == recording.violation


def test_the_same_seed_finds_the_same(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHRINK_SECONDS", 0.0)
    first, second = (MachineSearch().run(Limits(300.0), 3, silent) for _ in range(2))
    assert first.found_after == second.found_after
    assert first.recording == second.recording


def test_nothing_is_found_in_the_unchanged_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heard: list[int] = []
    findings = MachineSearch().run(
        Limits(4.0),
        1,
        lambda operations, states, rows, note="": heard.append(operations),
    )
    assert findings.recording is None, findings.recording
    assert findings.operations > 0
    assert findings.rows
    assert heard[-1] == findings.operations
    assert not list(tmp_path.iterdir()), "Hypothesis left files behind"


def test_what_is_found_at_the_end_is_replayed_to_the_end() -> None:
    setup = plain_setup()
    recording = Recording("machine", setup, (["flush", 0], [END]), NOTHING)
    assert MachineSearch().replay(recording) is None


@pytest.mark.parametrize(
    ("setup", "step"),
    [({"mib": 3}, ["flush", 0]), ({}, ["no such thing"]), ({}, ["flush"]), ({}, ["flush", "x"])],
    ids=["setup", "operation", "count", "argument"],
)
def test_a_recording_of_something_else(setup: dict[str, Any], step: list[Any]) -> None:
    recording = Recording("machine", plain_setup(**setup), (step,), NOTHING)
    with pytest.raises(UsageError, match="search `machine`"):
        MachineSearch().replay(recording)
