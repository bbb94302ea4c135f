# SPDX-License-Identifier: GPL-2.0-only
"""The suite on real devices: QEMU's own balloon over qtest, and ours over its socket."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.conform.backend import running

from hostzero.conform.control import Control
from hostzero.conform.known import load_known
from hostzero.conform.qemu import QemuTarget
from hostzero.conform.result import Outcome, Report
from hostzero.conform.run import run_suite
from hostzero.conform.suite import all_cases, select
from hostzero.conform.vhost_user import VhostUserTarget
from hostzero.vm.prepared import Prepared

KNOWN = Path(__file__).resolve().parents[1] / "docs" / "known"


@pytest.fixture
def qemu(prepared: Prepared, tmp_path: Path) -> str:
    """The prepared QEMU as one program."""
    return script(tmp_path, prepared, dict(prepared.qemu.environment))


def script(folder: Path, prepared: Prepared, environment: dict[str, str]) -> str:
    path = folder / "qemu"
    settings = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines = ["#!/bin/sh", *settings, f'exec {shlex.join(prepared.qemu.argv)} "$@"']
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return str(path)


def by_outcome(report: Report, outcome: Outcome) -> list[str]:
    return [result.case.id for result in report.results if result.outcome is outcome]


def test_qemus_own_balloon_has_its_known_deviations_and_no_others(qemu: str, prepared: Prepared) -> None:
    file = KNOWN / f"qemu-{'.'.join(prepared.qemu.version.split('.')[:2])}.toml"
    known = load_known(file) if file.exists() else {}
    report = run_suite(QemuTarget(qemu), all_cases(), known=known, strict=bool(known))
    assert by_outcome(report, Outcome.FAIL) == []
    assert report.ok, [by_outcome(report, Outcome.SHOULD), report.stale]
    assert report.facts["interrupts"] == "MSI-X"
    # Bits 6 and 7 are not QEMU's, nor can hinting be steered from outside.
    assert 110 < report.count()[Outcome.PASS] < len(all_cases())


def test_a_processor_that_stands_still_is_as_good_as_none(prepared: Prepared, tmp_path: Path) -> None:
    # Debian's qtest accelerator is a module; without its modules QEMU takes the next.
    target = QemuTarget(script(tmp_path, prepared, {"QEMU_MODULE_DIR": str(tmp_path)}))
    report = run_suite(target, select(["inflate-", "stats-", "report-"]))
    assert by_outcome(report, Outcome.FAIL) == by_outcome(report, Outcome.SHOULD) == []
    assert by_outcome(report, Outcome.NOT_RUN) == []
    assert by_outcome(report, Outcome.PASS)


def test_our_own_device_passes_over_its_socket(tmp_path: Path) -> None:
    with running(tmp_path) as backend:
        report = run_suite(VhostUserTarget(backend.socket, backend.control), all_cases(), strict=True)
        assert report.ok
        assert by_outcome(report, Outcome.NOT_APPLICABLE) == ["inflate-huge-host-page"]
        with Control(backend.control) as control:
            assert control.stats() is not None
