# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero conform`` from arguments to exit status and files."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hostzero.cli.main import run
from hostzero.conform import in_process
from hostzero.conform.case import Case
from hostzero.conform.rig import Rig
from hostzero.conform.suite import all_cases
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.ram import GuestMemory
from hostzero.virtio.features import Feature
from tests.conform.backend import running as running_device
from tests.conform.stand_in_qemu import script

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hostzero.cli.main import main
main()
"""


# A device that ends where it should refuse a request.
DIES = """
import os
from hostzero.cli.main import main
from hostzero.device.queue_server import QueueServer
QueueServer._refuse = lambda *given: os._exit(139)
main()
"""


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


def test_a_strict_run_is_strict_when_a_case_runs_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def misses(rig: Rig) -> None:
        rig.judge.should(False, "better")

    wish = Case("wish", "a wish", "9.9", __name__, misses)
    monkeypatch.setattr("hostzero.conform.suite.registered", lambda: [wish])
    monkeypatch.setattr("hostzero.conform.suite.cases.MODULES", [sys.modules[__name__]])
    assert run(["conform", "in-process", "--strict", "--json", "-"]) == 1
    captured = capsys.readouterr()
    alone = "hostzero conform in-process --strict --case wish"
    assert f"alone: {alone}" in captured.err
    assert json.loads(captured.out)["cases"][0]["alone"] == alone


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


def test_a_device_that_ends_in_a_case_leaves_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, junit = tmp_path / "report.json", tmp_path / "report.xml"
    names = ["deflate-one", "deflate-ragged-array", "stats-held"]
    with running_device(tmp_path, may_end=True, program=("-c", DIES)) as device:
        arguments = ["conform", str(device.socket), "--json", str(document), "--junit", str(junit)]
        assert run([*arguments, *(word for name in names for word in ("--case", name))]) == 1
    captured = capsys.readouterr()
    assert "the device went away" in captured.out
    assert "not run, the target is gone" in captured.out
    assert captured.out.splitlines()[-1] == "3 cases: 1 pass, 1 fail, 1 not run"
    report = json.loads(document.read_text())
    assert [case["outcome"] for case in report["cases"]] == ["pass", "fail", "not run"]
    assert report["ok"] is False
    tests = {test.attrib["name"]: test for test in ET.parse(junit).getroot().iter("testcase")}
    assert tests["stats-held"].find("error") is not None


def test_the_document_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "in-process", "--case", "inflate-one", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["counts"]["pass"] == 1
    assert "1 cases: 1 pass" in captured.err


def test_junit_alone_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["conform", "in-process", "--case", "inflate-one", "--junit", "-"]) == 0
    captured = capsysbinary.readouterr()
    assert len(list(ET.fromstring(captured.out).iter("testcase"))) == 1
    assert b"1 cases: 1 pass" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_list_needs_no_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", "--list"]) == 0
    shown = capsys.readouterr().out
    assert f"{len(all_cases())} cases" in shown
    assert all(case.id in shown for case in all_cases())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "TARGET or --qemu PATH is missing"),
        (["--qemu", "no-such-qemu"], "--qemu no-such-qemu: there is no such program"),
        (["in-process", "--qemu-arg=-S"], "--qemu-arg is for --qemu PATH"),
        (["nowhere.sock"], "nowhere.sock: is no socket"),
        (["in-process", "--case", "bit9"], "--case bit9: there is no such case"),
        (["in-process", "--known", "none.toml"], "--known none.toml: No such file"),
        (["in-process", "--json", "none/report.json"], "--json none/report.json: there is no directory"),
        (["in-process", "--junit", "none/report.xml"], "--junit none/report.xml: there is no directory"),
        (["in-process", "--json", "-", "--junit", "-"], "--json and --junit: only one of them may be -"),
        (["in-process", "--control", "c.sock"], "--control is for a device behind a socket"),
    ],
)
def test_wrong_arguments_are_2(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["conform", *arguments]) == 2
    assert f"hostzero conform: error: {why}" in capsys.readouterr().err


def test_a_qemu_is_judged_and_the_line_to_run_a_case_alone_has_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = str(script(tmp_path, "die"))
    arguments = ["conform", "--qemu", program, "--qemu-arg=-name", "--qemu-arg=a b", "--case", "inflate-one"]
    assert run(arguments) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"qemu:{program}: device virtio-balloon-pci of QEMU emulator" in shown
    assert "arguments -name a b" in shown
    assert "QEMU ended" in shown
    alone = f"hostzero conform --qemu {program} --qemu-arg=-name '--qemu-arg=a b' --case inflate-one"
    assert f"alone: {alone}" in shown


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_qemu(tmp_path: Path, number: int, status: int) -> None:
    program = script(tmp_path, "hang")
    command = [sys.executable, "-c", PROGRAM, "conform", "--qemu", str(program), "--case", "inflate-one"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not (started := running(str(tmp_path))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(20) == status
        while left := [each for each in started if Path(f"/proc/{each}").exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_report_of_what_was_judged(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = in_process.InProcessTarget.connect
    ready = iter([True])

    def connect(target: in_process.InProcessTarget) -> in_process.InProcessConnection:
        if not next(ready, False):
            signal.raise_signal(number)
        return judged(target)

    monkeypatch.setattr(in_process.InProcessTarget, "connect", connect)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    document = tmp_path / "report.json"
    try:
        assert run(["conform", "in-process", "--case", "bit6-", "--json", str(document)]) == status
    finally:
        signal.signal(signal.SIGINT, before)
    report = json.loads(document.read_text())
    assert report["counts"]["pass"] == 1
    assert report["counts"]["not run"] == len(report["cases"]) - 1
    assert {case["reason"] for case in report["cases"][1:]} == {f"{number.name} ended the run"}


def running(name: str) -> list[int]:
    """The stand-ins for QEMU of one test: the script, and the process that it has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
                if name in line and "-qtest" in line:
                    found.append(int(folder.name))
    return found


def test_a_run_leaves_the_log_as_it_was() -> None:
    log = logging.getLogger("hostzero")
    before = log.level
    assert run(["conform", "in-process", "--case", "bit6-"]) == 0
    assert log.level == before
