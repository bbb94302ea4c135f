# SPDX-License-Identifier: GPL-2.0-only
"""The rule at both of its thresholds."""

from __future__ import annotations

import pytest

from hostzero.bench.disturbance import RULE, is_disturbed


@pytest.mark.parametrize(
    ("wall", "task_clock", "disturbed"),
    [
        pytest.param(1.5, 0.5, False, id="exactly the floor"),
        pytest.param(1.6, 0.5, True, id="above the floor, and far above the share"),
        pytest.param(1.0, 0.1, False, id="a large share of little"),
        pytest.param(100, 95, False, id="exactly the share"),
        pytest.param(100, 94.9, True, id="above the share"),
        pytest.param(100, 97, False, id="above the floor, below the share"),
        pytest.param(10, 12, False, id="more CPU time than wall, as with two threads"),
    ],
)
def test_rule(wall: float, task_clock: float, disturbed: bool) -> None:
    assert is_disturbed(wall_ms=wall, task_clock_ms=task_clock) is disturbed


def test_the_rule_in_words_has_both_thresholds() -> None:
    assert "1 ms" in RULE
    assert "5%" in RULE
