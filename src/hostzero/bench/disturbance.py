# SPDX-License-Identifier: GPL-2.0-only
"""The rule that says which repetitions something else disturbed.

It is fixed here, before any run, so that no result can be chosen by it afterwards.

A measured stretch never waits: it allocates, writes and calls madvise on one thread.
So its wall time and its task-clock (CPU time of the process) should be the same, and
what the wall has more was spent waiting for a CPU that something else had. A
repetition is *disturbed* when that excess is above `FLOOR_MS` and above `SHARE` of
the wall time. The floor keeps the grain of the scheduler's accounting from
condemning stretches of a millisecond.

A disturbed repetition is kept, marked and counted. Tables give n and how many of it
were disturbed; ratios are given over all repetitions and over the undisturbed pairs.

What the rule cannot see: time that an outer hypervisor takes away without telling
(this machine may be a guest itself), slower memory while a neighbour uses the bus,
and an outer host that has taken back memory which the benchmark discarded.
"""

from __future__ import annotations

from typing import Final

FLOOR_MS: Final = 1.0
SHARE: Final = 0.05

RULE: Final = (
    f"wall - task-clock > max({FLOOR_MS:g} ms, {SHARE:.0%} of wall): "
    "something else had the CPU; the repetition is kept and marked"
)


def is_disturbed(*, wall_ms: float, task_clock_ms: float) -> bool:
    """Apply the rule of this module to one repetition (milliseconds)."""
    return wall_ms - task_clock_ms > max(FLOOR_MS, SHARE * wall_ms)
