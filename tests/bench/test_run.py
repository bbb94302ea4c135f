# SPDX-License-Identifier: GPL-2.0-only
"""A whole run on a small guest: every cell, counted bytes, the order, the check, the interrupt.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import Any

import pytest

from hostzero.bench.arms import ARMS
from hostzero.bench.guest import PreparedGuest
from hostzero.bench.names import COMPARISONS, TIMED, Arm, Phase, Scenario
from hostzero.bench.options import SCENARIOS, BenchOptions
from hostzero.bench.progress import Silent
from hostzero.bench.results import Results
from hostzero.bench.run import RUNNERS, run_bench
from hostzero.bench.timed import CHURN_CYCLES, TimedScenario
from hostzero.document import to_json
from hostzero.errors import VmBug
from hostzero.ram import Ram, ZeroProof, open_ram
from hostzero.ram.residency import private_resident
from tests.bench.recorder import Recorder
from tests.ram.host import mapped

MIB = 1 << 20
SIZE = 16 * MIB
TABLES = MIB
REPETITIONS = 2
TINY = BenchOptions(memory=80 * MIB, size=SIZE, repetitions=REPETITIONS)


def private_memory(ram: Ram) -> int:
    """Return the bytes under a closed memory, whose mapping the arrays of a guest may keep."""
    return private_resident(ram.base, ram.size) if mapped(ram.base) else 0


Cells = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def ran() -> tuple[Results, Recorder]:
    TINY.validate()
    recorder = Recorder()
    return run_bench(TINY, recorder), recorder


@pytest.fixture(scope="module")
def document(ran: tuple[Results, Recorder]) -> dict[str, Any]:
    text = to_json(ran[0].to_document())
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@pytest.fixture(scope="module")
def cells(document: dict[str, Any]) -> Cells:
    return {(one["scenario"], one["arm"], one["phase"]): one for one in document["results"]}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Ram]:
    """Every memory that a run opens."""
    rams: list[Ram] = []

    def spy(size: int, backing: str = "anonymous") -> Ram:
        # One guest at a time: the host has promised memory for one.
        assert not [ram for ram in rams if not ram.closed or mapped(ram.base)]
        rams.append(open_ram(size, backing))
        return rams[-1]

    monkeypatch.setattr("hostzero.bench.context.open_ram", spy)
    return rams


# ------------------------------------------------------------------ the document


@pytest.mark.compiled_only
def test_every_cell_has_every_repetition(document: dict[str, Any], cells: Cells) -> None:
    wanted = {(scenario, arm, phase) for scenario in TIMED for arm in ARMS for phase in Phase}
    assert set(cells) == wanted
    assert len(document["results"]) == len(wanted)
    for (_, _, phase), cell in cells.items():
        columns = {name: values for name, values in cell.items() if name not in {"scenario", "arm", "phase"}}
        lengths = {name: None if values is None else len(values) for name, values in columns.items()}
        counts_hardware = not document["host"]["hardware_counters"].startswith("not available")
        assert lengths == dict.fromkeys(lengths, REPETITIONS) | (
            {"host_faulted_bytes": None if phase == Phase.CHURN else REPETITIONS}
            | dict.fromkeys(("instructions", "cache_misses"), REPETITIONS if counts_hardware else None)
        )
        assert all(value > 0 for name in ("task_clock_ms", "wall_ms") for value in cell[name])


@pytest.mark.compiled_only
def test_every_comparison_is_there(document: dict[str, Any]) -> None:
    found = [
        (one["scenario"], one["phase"], one["arm"], one["against"], one["n"])
        for one in document["comparisons"]
    ]
    assert found == [
        (scenario, phase, arm, against, REPETITIONS)
        for scenario in TIMED
        for phase in Phase
        for arm, against in COMPARISONS
    ]


@pytest.mark.compiled_only
def test_the_document_says_how_it_was_made_and_can_be_read_back(
    ran: tuple[Results, Recorder], document: dict[str, Any]
) -> None:
    assert document["version"] == 1
    assert document["config"] == TINY.to_config() | {
        "scenarios": list(TIMED),
        "disturbance_rule": document["config"]["disturbance_rule"],
    }
    assert document["host"]["kernel"]
    assert Results.from_document(document).series == ran[0].series


@pytest.mark.compiled_only
def test_as_many_steps_as_announced(ran: tuple[Results, Recorder]) -> None:
    recorder = ran[1]
    assert recorder.scenarios == [(scenario, 4 + 4 * 3 * REPETITIONS) for scenario in TIMED]
    assert [len(steps) for steps in recorder.steps] == [steps for _, steps in recorder.scenarios]


def test_every_scenario_has_what_runs_it() -> None:
    assert set(RUNNERS) == set(Scenario) == set(SCENARIOS)


# ------------------------------------------------------------------ who zeroed


@pytest.fixture(params=TIMED)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    one: Scenario = request.param
    return one


@pytest.mark.compiled_only
@pytest.mark.parametrize("phase", Phase)
def test_each_arm_zeroes_what_it_must(cells: Cells, scenario: Scenario, phase: Phase) -> None:
    def column(arm: Arm, name: str) -> list[int]:
        values: list[int] = cells[scenario, arm, phase][name]
        return values

    populated = SIZE * (CHURN_CYCLES if phase is Phase.CHURN else 1)
    for arm in (Arm.NEVER_REPORTED, Arm.BASELINE):
        assert column(arm, "known_zero_bytes") == [0] * REPETITIONS
        for zeroed in column(arm, "guest_zeroed_bytes"):
            assert populated <= zeroed < populated + TABLES
    # What is parked on a CPU's list is not reported, hence not all.
    for zeroed, known, baseline in zip(
        column(Arm.OPTIMIZED, "guest_zeroed_bytes"),
        column(Arm.OPTIMIZED, "known_zero_bytes"),
        column(Arm.BASELINE, "guest_zeroed_bytes"),
        strict=True,
    ):
        if scenario is Scenario.HUGETLB_RESERVED:  # which forgets what the host zeroed
            assert known < TABLES
        else:
            assert known >= populated // 4
            assert zeroed < baseline
        assert populated <= zeroed + known < populated + TABLES
    for zeroed, known in zip(
        column(Arm.NO_ZEROING, "guest_zeroed_bytes"),
        column(Arm.NO_ZEROING, "known_zero_bytes"),
        strict=True,
    ):
        assert zeroed + known < TABLES


@pytest.mark.compiled_only
def test_only_arms_that_give_memory_away_have_it_returned(cells: Cells, scenario: Scenario) -> None:
    for (of, arm, _), cell in cells.items():
        if of == scenario:
            for returned in cell["host_returned_bytes"]:
                assert returned == 0 if arm == Arm.NEVER_REPORTED else returned >= SIZE


@pytest.mark.compiled_only
def test_the_host_zeroes_at_the_first_touch(cells: Cells, scenario: Scenario) -> None:
    """In the optimized arm that is moved behind the populate, not saved."""

    def faulted(arm: Arm, phase: Phase) -> list[int]:
        values: list[int] = cells[scenario, arm, phase]["host_faulted_bytes"]
        return values

    for arm in (Arm.BASELINE, Arm.OPTIMIZED, Arm.NO_ZEROING):
        for phase in (Phase.POPULATE_TOUCH, Phase.POPULATE_FILL):
            assert min(faulted(arm, phase)) >= SIZE // 2
    assert min(faulted(Arm.BASELINE, Phase.POPULATE)) >= SIZE // 2
    if scenario is not Scenario.HUGETLB_RESERVED:
        assert max(faulted(Arm.OPTIMIZED, Phase.POPULATE)) < SIZE // 2
    for phase in (Phase.POPULATE, Phase.POPULATE_TOUCH, Phase.POPULATE_FILL):
        assert max(faulted(Arm.NEVER_REPORTED, phase)) < SIZE // 2


# ------------------------------------------------------------------ the order


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that plays a run without guests and gives the arms in order, by scenario."""
    seen: dict[str, list[str]] = {}

    def note(scenario: TimedScenario, arm: Arm) -> None:
        seen.setdefault(str(scenario._scenario), []).append(str(arm))

    monkeypatch.setattr(TimedScenario, "_touch", note)
    for method in ("_check", "_fill", "_churn"):
        monkeypatch.setattr(TimedScenario, method, lambda *_: None)
    monkeypatch.setattr("hostzero.warmup.warm_up", lambda *_: None)

    def play(**options: Any) -> dict[str, list[str]]:
        seen.clear()
        run_bench(BenchOptions(memory=80 * MIB, size=SIZE, **options), Silent())
        return dict(seen)

    return play


def test_the_order_is_the_seeds(orders: Any) -> None:
    first = orders(seed=1, repetitions=10)
    assert orders(seed=1, repetitions=10) == first
    assert orders(seed=2, repetitions=10) != first
    assert len({tuple(order) for order in first.values()}) == len(TIMED)


def test_each_repetition_runs_every_arm_once(orders: Any) -> None:
    for order in orders(seed=3, repetitions=8).values():
        repetitions = [order[at : at + 4] for at in range(0, len(order), 4)]
        assert len(repetitions) == 8
        assert all(sorted(one) == sorted(ARMS) for one in repetitions)
        assert len({tuple(one) for one in repetitions}) > 1


def test_a_scenario_has_its_order_whichever_others_run(orders: Any) -> None:
    together = orders(seed=4, repetitions=5)
    alone = orders(seed=4, repetitions=5, scenarios=(Scenario.BALLOON,))
    assert alone == {"balloon": together["balloon"]}


# ------------------------------------------------------------------ what must end a run


@pytest.mark.compiled_only
def test_a_host_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch, opened: list[Ram]) -> None:
    """It says that it dropped the memory, and keeps it: the optimized arm then hands out dirt."""

    def keep(ram: Ram, offset: int, length: int) -> ZeroProof:
        return really_discard(ram, offset, length) if length == ram.size else ZeroProof(offset, length)

    really_discard = Ram.discard
    monkeypatch.setattr(Ram, "discard", keep)
    recorder = Recorder()
    with pytest.raises(VmBug, match=r"^thp/optimized: address 0x7f[0-9a-f]+ does not read as zero$"):
        run_bench(BenchOptions(memory=80 * MIB, size=SIZE, repetitions=1), recorder)
    assert recorder.steps[-1] == ["never-reported: contents checked", "baseline: contents checked"]
    assert len(opened) == 3
    assert all(ram.closed for ram in opened)


@pytest.mark.compiled_only
@pytest.mark.parametrize("arm", [Arm.NEVER_REPORTED, Arm.BASELINE, Arm.OPTIMIZED])
def test_every_arm_that_zeroes_is_checked(monkeypatch: pytest.MonkeyPatch, arm: Arm) -> None:
    def find(guest: PreparedGuest, address: int) -> int | None:
        return address + 0x18 if guest.arm is arm else None

    monkeypatch.setattr(PreparedGuest, "first_nonzero", find)
    with pytest.raises(VmBug, match=f"^balloon/{arm}: address 0x7f[0-9a-f]+18 does not read as zero$"):
        run_bench(
            BenchOptions(scenarios=(Scenario.BALLOON,), memory=64 * MIB, size=SIZE, repetitions=1), Silent()
        )


@pytest.mark.compiled_only
def test_the_arm_that_never_zeroes_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Arm] = []

    def find(guest: PreparedGuest, _address: int) -> None:
        checked.append(guest.arm)

    monkeypatch.setattr(PreparedGuest, "first_nonzero", find)
    run_bench(
        BenchOptions(scenarios=(Scenario.BALLOON,), memory=64 * MIB, size=SIZE, repetitions=1), Silent()
    )
    assert checked == [Arm.NEVER_REPORTED, Arm.BASELINE, Arm.OPTIMIZED]


@pytest.mark.compiled_only
@pytest.mark.parametrize("step", [1, 4, 5, 9, 16])
def test_an_interrupt_leaves_no_memory_behind(opened: list[Ram], step: int) -> None:
    recorder = Recorder(interrupt_at=step)
    with pytest.raises(KeyboardInterrupt):
        run_bench(
            BenchOptions(scenarios=(Scenario.BALLOON,), memory=64 * MIB, size=SIZE, repetitions=1), recorder
        )
    assert len(recorder.steps[-1]) == step
    assert 1 <= len(opened) <= step
    assert all(ram.closed for ram in opened)
    assert gc.isenabled()
    assert private_memory(opened[-1]) == 0
    gc.collect()  # guest, driver and device refer to each other
    assert not any(mapped(ram.base) for ram in opened)


@pytest.mark.compiled_only
def test_an_interrupt_in_a_measured_stretch_leaves_no_memory_behind(
    opened: list[Ram], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(guest: PreparedGuest, _address: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TimedScenario, "_check", lambda *_: None)
    monkeypatch.setattr(PreparedGuest, "fill", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench(TINY, Recorder())
    assert all(ram.closed for ram in opened)
    assert gc.isenabled()
    assert private_memory(opened[-1]) == 0
    gc.collect()
    assert not any(mapped(ram.base) for ram in opened)


@pytest.mark.compiled_only
def test_a_run_has_one_guest_at_a_time_and_keeps_none(opened: list[Ram]) -> None:
    """The fixture looks, each time that memory is opened."""
    run_bench(dataclasses.replace(TINY, scenarios=(Scenario.BALLOON,), repetitions=1), Silent())
    assert len(opened) == 4 + 4 * 3
    assert all(ram.closed for ram in opened)
    assert private_memory(opened[-1]) == 0
