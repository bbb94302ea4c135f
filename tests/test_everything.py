# SPDX-License-Identifier: GPL-2.0-only
"""Every feature at once, in any order, on one machine: they meet where no other test has them meet.

The operations and what is looked at after each are those of `hostzero check --search machine`; here
are a few examples of each kind of guest, for every change.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from hostzero.check.machine import run_steps
from hostzero.check.machine_ops import Operation, load_operations
from hostzero.check.world_setup import plain_setup
from hostzero.jit import COMPILER_ON

OPERATIONS = sorted(load_operations().values(), key=lambda operation: operation.name)
GUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-nodes": {"two_nodes": True, "nr_cpus": 2, "mib": 8, "thp": "madvise", "features": 1},
    "gigantic": {"gigantic": True, "cma": True, "mib": 32, "reporting": (2, 9)},
    "poisoned": {"page_poisoning": True, "swap_pages": 64},
    "zeroed-on-free": {"init_on_free": True, "features": 6, "backing": "memfd"},
    "zeroed-on-alloc": {"init_on_alloc": True, "anon_orders": (2, 4, 8), "swap_pages": 1024},
    "aliasing": {"dcache_aliasing": True, "reporting": (32, 3), "debug_vm": False},
    "zero-aware": {"placement": "zero-aware", "reporting": (8, 5), "features": 3},
    "without-the-series": {"user_zeroing": "caller", "features": 5},
    "confidential": {"confidential": True, "icache_aliasing": True},
}
STEPS = 400 if COMPILER_ON else 25


def drawn(random_source: random.Random, operation: Operation) -> list[Any]:
    return [operation.name, *(random_source.randint(0, most) for most in operation.most)]


@pytest.mark.parametrize("guest", GUESTS)
def test_everything_at_once(guest: str) -> None:
    source = random.Random(guest)
    steps = [["flush", 0], *(drawn(source, source.choice(OPERATIONS)) for _ in range(STEPS))]
    violation, done = run_steps(plain_setup(**GUESTS[guest]), steps, close=True)
    assert violation is None, "\n".join([*map(str, steps[:done]), *violation.lines()])
