# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero conform`` from arguments to exit status and files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hostzero.cli.main import run
from hostzero.conform import in_process
from hostzero.conform.suite import all_cases
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.ram import GuestMemory
from hostzero.virtio.features import Feature


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without statistics that reads its configuration space from the start always."""

    class Wrong(BalloonDevice):
        def read_config(self, offset: int, length: int) -> bytes:
            return super().read_config(0, 16)[:length]

    def make(memory: GuestMemory) -> BalloonDevice:
        return Wrong(memory, DeviceConfig(IMPLEMENTED & ~Feature.STATS_VQ))

    monkeypatch.setattr(in_process.InProcessTarget.__init__, "__defaults__", (make, "memfd"))


def test_a_device_that_passes_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "in-process", "--case", "bit6-"]) == 0
    shown = capsys.readouterr().out
    assert "in-process: device hostzero" in shown
    assert shown.splitlines()[-1] == "10 cases: 10 pass"


def test_a_device_that_fails_is_1(wrong: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "in-process", "--case", "config-parts", "--case", "stats-held"]) == 1
    shown = capsys.readouterr().out
    assert "fail config-parts" in shown
    assert "alone: hostzero conform in-process --case config-parts" in shown
    assert "not applicable, stats-vq is not offered: stats-held" in shown
    assert shown.splitlines()[-1] == "2 cases: 1 fail, 1 not applicable"


def test_a_known_deviation_is_0_and_a_stale_one_is_1(wrong: None, tmp_path: Path) -> None:
    known = tmp_path / "known.toml"
    known.write_text('[deviations]\nconfig-parts = "tracker 7"\n')
    arguments = ["conform", "in-process", "--case", "config-parts", "--case", "inflate-one", "--known"]
    assert run([*arguments, str(known)]) == 0
    known.write_text('[deviations]\nconfig-parts = "tracker 7"\ninflate-one = "was broken"\n')
    assert run([*arguments, str(known)]) == 1


def test_the_report_as_files(tmp_path: Path) -> None:
    document, junit = tmp_path / "report.json", tmp_path / "report.xml"
    arguments = [
        "conform",
        "in-process",
        "--case",
        "inflate-one",
        "--json",
        str(document),
        "--junit",
        str(junit),
    ]
    assert run(arguments) == 0
    report = json.loads(document.read_text())
    assert report["ok"] is True
    assert [case["id"] for case in report["cases"]] == ["inflate-one"]
    assert len(list(ET.parse(junit).getroot().iter("testcase"))) == 1


def test_the_document_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "in-process", "--case", "inflate-one", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["counts"]["pass"] == 1
    assert "1 cases: 1 pass" in captured.err


def test_the_list_needs_no_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "--list"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(all_cases())} cases" in shown
    assert all(case.id in shown for case in all_cases())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "TARGET is missing"),
        (["nowhere.sock"], "nowhere.sock: is no socket"),
        (["in-process", "--case", "bit9"], "--case bit9: there is no such case"),
        (["in-process", "--known", "none.toml"], "--known none.toml: No such file"),
        (["in-process", "--json", "none/report.json"], "--json none/report.json: there is no directory"),
        (["in-process", "--junit", "none/report.xml"], "--junit none/report.xml: there is no directory"),
        (["in-process", "--control", "c.sock"], "--control is for a device behind a socket"),
    ],
)
def test_wrong_arguments_are_2(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", *arguments]) == 2
    assert f"hostzero conform: error: {why}" in capsys.readouterr().err


def test_a_run_leaves_the_log_as_it_was() -> None:
    log = logging.getLogger("hostzero")
    before = log.level
    assert run(["conform", "in-process", "--case", "bit6-"]) == 0
    assert log.level == before
