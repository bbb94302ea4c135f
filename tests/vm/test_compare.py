# SPDX-License-Identifier: GPL-2.0-only
"""The plan, the order, the pairs and the document."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostzero.errors import UsageError, VmError
from hostzero.vm import compare, huge_pages
from hostzero.vm.accel import Accel
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.compare import Plan, in_turn, run_compare
from hostzero.vm.compare_phases import ArmName, Phase
from hostzero.vm.progress import Lines, Silent
from hostzero.vm.steps import MIB
from tests.vm.samples import comparison, sample
from tests.vm.stand_in import prepared_with, write_qemu

OURS, THEIRS = ArmName.HOSTZERO, ArmName.QEMU


def test_the_first_arm_alternates() -> None:
    assert [in_turn(turn)[0] for turn in range(-1, 3)] == [THEIRS, OURS, THEIRS, OURS]
    assert all(sorted(in_turn(turn)) == sorted(ArmName) for turn in range(2))


def test_sizes_and_features() -> None:
    plan = Plan()
    assert (plan.inflate, plan.report, plan.memory) == (1024 * MIB, 512 * MIB, 2048 * MIB)
    assert plan.features(reporting=True) is None
    assert plan.features(reporting=False) == "-reporting,-device-init-reported"
    huge = Plan(huge_pages=True)
    assert (huge.inflate, huge.guests_memory) == (512 * MIB, 2048 * MIB)
    assert huge.features(reporting=True) == "+must-tell-host"


def test_pairs_are_repetitions_of_one_number_whatever_their_order() -> None:
    (setting,) = comparison().settings
    assert [found.repetition for found in setting.of(OURS, Phase.INFLATE)] == [0, 1]
    ratio = setting.ratio(Phase.INFLATE, lambda found: found.device)
    assert ratio.ratio == pytest.approx((0.5 * 1.0) ** 0.5)
    assert ratio.n == 2
    assert setting.phases() == [Phase.INFLATE]


def test_the_document_has_every_repetition_and_is_json() -> None:
    document = json.loads(json.dumps(comparison().to_document(), allow_nan=False))
    (setting,) = document["settings"]
    assert setting["acked"] == {"hostzero": [1, 5], "qemu": [1, 5]}
    assert len(setting["samples"]) == 4
    assert setting["samples"][1]["device"] == 1.0
    assert [found["disturbed"] for found in setting["samples"]] == [False, True, False, False]
    assert setting["ratios"]["inflate"]["wall"]["ratio"] == pytest.approx(0.5)
    assert document["guest"]["inflate"] == 1024 * MIB


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Guests that write down what is done to them; returns that list."""
    log: list[str] = []

    @contextmanager
    def opened(
        name: ArmName, prepared: object, options: GuestOptions, features: str | None
    ) -> Iterator[object]:
        log.append(f"{name} begins, {options.append}, reporting {options.reporting}, {features}")
        yield SimpleNamespace(name=name, guest=SimpleNamespace(acked_features=lambda name: {5, 1}))
        log.append(f"{name} ends")

    def done(*phases: Phase):  # type: ignore[no-untyped-def]
        def run(arm: SimpleNamespace, turn: int, size: int):  # type: ignore[no-untyped-def]
            log.append(f"{arm.name} {phases[0]} {turn} {size // MIB}")
            return [sample(arm.name, phase, turn, main=1.0) for phase in phases]

        return run

    monkeypatch.setattr(compare, "open_arm", opened)
    monkeypatch.setattr(compare, "rest", lambda arm: log.append(f"{arm.name} rests"))
    monkeypatch.setattr(compare, "balloon_phases", done(Phase.INFLATE, Phase.DEFLATE))
    monkeypatch.setattr(compare, "report_phase", done(Phase.REPORT))
    return log


def test_both_guests_live_through_a_stage_and_the_warm_up_does_not_count(
    guests: list[str], tmp_path: Path
) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q"))
    said = io.StringIO()
    found = run_compare(prepared, Accel("tcg"), Plan(("x=1",), repeat=1), Lines(said))
    balloon = "quiet x=1, reporting False, -reporting,-device-init-reported"
    assert guests == [
        f"hostzero begins, {balloon}",
        f"qemu begins, {balloon}",
        "hostzero rests",
        "qemu rests",
        "qemu inflate -1 1024",
        "hostzero inflate -1 1024",
        "hostzero inflate 0 1024",
        "qemu inflate 0 1024",
        "qemu ends",
        "hostzero ends",
        "hostzero begins, quiet x=1, reporting True, None",
        "qemu begins, quiet x=1, reporting True, None",
        "hostzero rests",
        "qemu rests",
        "qemu report -1 512",
        "hostzero report -1 512",
        "hostzero report 0 512",
        "qemu report 0 512",
        "qemu ends",
        "hostzero ends",
    ]
    (setting,) = found.settings
    assert {found.repetition for found in setting.samples} == {0}
    assert setting.phases() == list(Phase)
    assert setting.acked == {OURS: [1, 5], THEIRS: [1, 5]}
    assert "x=1: booting two guests for inflate and deflate" in said.getvalue()


def test_a_phase_that_fails_ends_both_guests(
    guests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise VmError("the guest is gone")

    monkeypatch.setattr(compare, "balloon_phases", fail)
    opened = vars(compare)["open_arm"]  # what the fixture has put there
    closed: list[str] = []

    @contextmanager
    def watched(*given: object) -> Iterator[object]:
        try:
            with opened(*given) as arm:
                yield arm
        finally:
            closed.append("closed")

    monkeypatch.setattr(compare, "open_arm", watched)
    with pytest.raises(VmError, match="the guest is gone"):
        run_compare(prepared_with(tmp_path, write_qemu(tmp_path / "q")), Accel("tcg"), Plan(), Silent())
    assert closed == ["closed", "closed"]


def test_huge_pages_are_asked_for_before_a_guest_starts(
    guests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nr_hugepages", "free_hugepages", "resv_hugepages"):
        (tmp_path / name).write_text("0\n")
    monkeypatch.setattr(compare, "require_pages", lambda size: huge_pages.require_pages(size, tmp_path))
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q"))
    with pytest.raises(UsageError, match=r"2G needs 1024 free 2 MiB pages .*sysctl vm.nr_hugepages=1024"):
        run_compare(prepared, Accel("tcg"), Plan(huge_pages=True), Silent())
    assert guests == []
