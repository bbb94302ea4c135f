# SPDX-License-Identifier: GPL-2.0-only
"""The random search of the allocator: quiet where all is well, loud and short where not."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from hostzero.check.recording import Recording
from hostzero.check.search import Limits
from hostzero.check.small import allocator, allocator_loop, layout, step_codes, steps
from hostzero.check.small.allocator import AllocatorSearch, draw_setup, draw_weights, history_of, replay_steps
from hostzero.check.small.allocator_loop import COUNT
from hostzero.check.small.small_guest import Setup
from hostzero.check.violation import Violation
from hostzero.errors import UsageError


def silent(operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
    """Hear of progress and say nothing."""


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    search = AllocatorSearch()
    search.prepare()
    findings = search.run(Limits(seconds=1.0), 7, silent)
    assert findings.recording is None
    assert findings.operations > 100
    assert sum(findings.rows.values()) > 10
    assert set(findings.rows) <= set(layout.ROWS)


def test_setups_and_weights_come_from_the_seed() -> None:
    assert [draw_setup(random.Random(n), None) for n in range(5)] == [
        draw_setup(random.Random(n), None) for n in range(5)
    ]
    assert draw_setup(random.Random(1), 48).pages == 48
    for n in range(50):
        draw_setup(random.Random(n), None).validate()
        weights = draw_weights(random.Random(n), draw_setup(random.Random(n), None))
        assert weights[step_codes.ALLOC] > 0
        assert weights[step_codes.FREE_BLOCK] > 0


def first_dirty_free(log: Any, count: int) -> int | None:
    """Return how many steps it takes until a block is freed dirty, or None."""
    for at in range(0, 4 * count, 4):
        if log[at] == step_codes.FREE_BLOCK and log[at + 2] == step_codes.DIRTY:
            return at // 4 + 1
    return None


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that take any dirty block that is freed for corruption."""
    real_steps, real_log = allocator_loop.run_steps, allocator_loop.run_log

    def run_steps(mem: Any, scene: Any, loop: Any, weights: Any, log: Any, row: Any, count: int) -> int:
        code = int(real_steps(mem, scene, loop, weights, log, row, count))
        end = first_dirty_free(log, int(loop[COUNT]))
        if end is None:
            return code
        loop[COUNT] = end
        return int(layout.fail(scene, layout.NOT_ZERO, 0, 0, -1))

    def run_log(mem: Any, scene: Any, log: Any, loop: Any, count: int, deep: bool) -> int:
        for at in range(count):
            code = int(steps.act(mem, scene, *(int(value) for value in log[4 * at : 4 * at + 4])))
            if code == layout.DONE and first_dirty_free(log[4 * at : 4 * at + 4], 1):
                return int(layout.fail(scene, layout.NOT_ZERO, 0, 0, -1))
        return int(real_log(mem, scene, log, loop, 0, deep))

    monkeypatch.setattr(allocator, "run_steps", run_steps)
    monkeypatch.setattr(allocator, "run_log", run_log)


@pytest.mark.usefixtures("picky")
def test_what_is_found_is_made_short_and_can_be_run_again() -> None:
    search = AllocatorSearch()
    findings = search.run(Limits(seconds=20.0, pages=16), 3, silent)
    recording = findings.recording
    assert recording is not None
    assert findings.found_after == findings.operations
    assert [step[0] for step in recording.steps] == ["alloc", "free"]
    assert recording.violation.kind == "corruption"
    assert len(recording.violation.history) >= 2
    assert search.replay(Recording.from_json(recording.to_json())) == recording.violation


def test_a_recording_that_does_not_fail_finds_nothing() -> None:
    taken = (["alloc", 0, 1, 0], ["free", 0, 1, 0], ["report-send"])
    recording = Recording("allocator", Setup(pages=16).to_json(), taken, Violation("rot", "nothing"))
    assert AllocatorSearch().replay(recording) is None
    assert replay_steps(Setup(pages=16), []) is None


def test_the_story_of_a_page() -> None:
    story = history_of(Setup(pages=16), [["alloc", 0, 0, 0], ["free", 0, 3, 0], ["drain"]], 0)
    assert story[0].startswith("at boot: free list of order 4")
    assert any("owned" in event for event in story)
    assert any("known zero" in event for event in story)


def test_bad_steps_are_refused() -> None:
    recording = Recording("allocator", Setup(pages=16).to_json(), (["dance"],), Violation("rot", ""))
    with pytest.raises(UsageError, match="dance"):
        AllocatorSearch().replay(recording)


def test_episodes_end() -> None:
    assert allocator._EPISODE % allocator._CHUNK == 0
