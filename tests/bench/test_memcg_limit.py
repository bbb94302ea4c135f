# SPDX-License-Identifier: GPL-2.0-only
"""The memcg-limit scenario on a small guest: what is zeroed in vain, by whom, and what is not."""

from __future__ import annotations

import pytest

from hostzero.bench.memcg_limit import CASES
from hostzero.bench.names import Arm, Scenario
from hostzero.bench.options import BenchOptions
from hostzero.bench.results import Counts, Results
from hostzero.bench.run import run_bench
from tests.bench.recorder import Recorder

MIB = 1 << 20
SIZE = 16 * MIB
RANGES = SIZE // (2 * MIB)
TINY = BenchOptions(scenarios=(Scenario.MEMCG_LIMIT,), memory=96 * MIB, size=SIZE, repetitions=2)


@pytest.fixture(scope="module")
def ran() -> tuple[Results, Recorder]:
    recorder = Recorder()
    return run_bench(TINY, recorder), recorder


def counts(results: Results, pattern: str, arm: Arm, zeroing: str) -> Counts:
    case = {"pattern": pattern, "arm": str(arm), "zeroing": zeroing}
    (found,) = (one for one in results.counted_in(Scenario.MEMCG_LIMIT) if one.case == case)
    return found


@pytest.mark.compiled_only
def test_every_case_has_every_repetition(ran: tuple[Results, Recorder]) -> None:
    cases = ran[0].counted_in(Scenario.MEMCG_LIMIT)
    assert len(cases) == len(CASES) == 8
    assert {len(values) for one in cases for values in one.values.values()} == {2}
    assert ran[1].scenarios == [("memcg-limit", 8 * 2)]
    assert len(ran[1].steps[0]) == 8 * 2


@pytest.mark.compiled_only
def test_each_refused_huge_page_was_zeroed_in_vain_by_the_allocator(ran: tuple[Results, Recorder]) -> None:
    sparse = counts(ran[0], "sparse", Arm.BASELINE, "allocator")
    assert sparse.defined("zeroed_in_vain_bytes") == [RANGES * 2 * MIB] * 2
    assert sparse.defined("failed_charges") == [RANGES] * 2
    assert sparse.defined("got_bytes") == [RANGES * 4096] * 2
    assert sparse.defined("refused") == [0, 0]


@pytest.mark.compiled_only
def test_zeroing_after_the_charge_wastes_no_huge_page(ran: tuple[Results, Recorder]) -> None:
    for arm in (Arm.BASELINE, Arm.OPTIMIZED):
        sparse = counts(ran[0], "sparse", arm, "caller")
        assert sparse.defined("zeroed_in_vain_bytes") == [0, 0]
        assert sparse.defined("failed_charges") == [RANGES] * 2


@pytest.mark.compiled_only
def test_a_page_known_to_be_zero_is_wasted_once(ran: tuple[Results, Recorder]) -> None:
    """The block that failed its charge is freed as any other: the next fault must zero it."""
    sparse = counts(ran[0], "sparse", Arm.OPTIMIZED, "allocator")
    for wasted in sparse.defined("zeroed_in_vain_bytes"):
        assert wasted <= RANGES * 2 * MIB


@pytest.mark.compiled_only
@pytest.mark.parametrize("arm", [Arm.BASELINE, Arm.OPTIMIZED])
@pytest.mark.parametrize("zeroing", ["allocator", "caller"])
def test_one_process_is_refused_once(ran: tuple[Results, Recorder], arm: Arm, zeroing: str) -> None:
    one = counts(ran[0], "one-process", arm, zeroing)
    assert one.defined("refused") == [1, 1]
    assert one.defined("got_bytes") == [SIZE] * 2
    assert all(wasted <= 2 * MIB + 4096 for wasted in one.defined("zeroed_in_vain_bytes"))
