# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero fuzz`` from arguments to exit status and files, against devices in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.cli.main import run
from hostzero.conform.fuzz.watch import Watch
from hostzero.vhost_user.control_client import ControlClient
from tests.conform.backend import Backend, running
from tests.conform.fuzz.fakes import wait_for

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hostzero.cli.main import main
main()
"""
WRONG = ("-m", "tests.conform.fuzz.wrong_device", "drops nothing")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with running(tmp_path_factory.mktemp("device")) as made:
        yield made


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with running(tmp_path_factory.mktemp("wrong"), program=WRONG) as made:
        yield made


def once(backend: Backend, *arguments: str) -> list[str]:
    """The command line for one connection."""
    control = ["--control", str(backend.control)]
    return ["fuzz", f"unix:{backend.socket}", *control, "--seed", "1", "--episode", "2", *arguments]


def test_nothing_found_is_0(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(once(backend)) == 0
    shown = capsys.readouterr()
    assert "What was sent" in shown.out
    assert shown.out.splitlines()[-1].startswith("nothing found: 1 connections, ")
    assert shown.out.splitlines()[-1].endswith("; seed 1")
    assert shown.err == ""


def test_it_ends_after_its_time_and_says_what_it_left_out(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fuzz", str(backend.socket), "--seconds", "0.001"]) == 0
    shown = capsys.readouterr().out
    assert "no --control: not checked that status is answered" in shown
    assert shown.splitlines()[-1].startswith("nothing found: 1 connections, ")


def test_another_seed_is_drawn_each_time(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []

    def draw(limit: int) -> int:
        drawn.append(limit)
        return 12345

    monkeypatch.setattr("hostzero.cli.fuzz.secrets.randbelow", draw)
    assert run(["fuzz", str(backend.socket), "--seconds", "0.001"]) == 0
    assert drawn == [1 << 32]
    assert capsys.readouterr().out.splitlines()[-1].endswith("; seed 12345")


def test_something_found_is_1_and_can_be_run_again(
    wrong: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fuzz", f"unix:{wrong.socket}", "--control", str(wrong.control)]
    assert run([*command, "--seconds", "60", "--seed", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (found,) = [line for line in lines if line.startswith("claim: ")]
    again = lines[-1].removeprefix("that connection alone: hostzero ").split()
    assert again[:4] == command
    assert again[4:7] == ["--seed", "1", "--episode"]
    assert run(again) == 1
    assert found in capsys.readouterr().out.splitlines()


def test_the_document_alone_on_standard_output(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(once(backend, "--json", "-")) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["ok"], document["seed"], document["episodes"]) == (True, 1, 1)
    assert document["target"] == str(backend.socket)
    assert document["finding"] is None
    assert document["done"]["connection"] == 1
    assert document["backend"]["descriptors"] > 0
    assert "nothing found" in shown.err


def test_the_document_as_a_file(wrong: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    command = ["fuzz", str(wrong.socket), "--seconds", "60", "--seed", "1"]
    assert run([*command, "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert not document["ok"]
    assert document["finding"]["kind"] == "claim"
    assert document["finding"]["seed"] == 1
    assert document["finding"]["last"]
    assert document["left_out"] == ["no --control: not checked that status is answered"]
    assert "claim: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "Missing argument 'TARGET'"),
        (["none.sock"], "none.sock: no backend listens there: No such file or directory"),
        (["unix:none.sock"], "none.sock: no backend listens there: No such file or directory"),
        (["README.md"], "README.md: no backend listens there: "),
        (["x" * 200], "no backend listens there: AF_UNIX path too long"),
        (["none.sock", "--seconds", "0"], "--seconds 0: must be above zero"),
        (["none.sock", "--seconds", "-1"], "--seconds -1: must be above zero"),
        (["none.sock", "--seconds", "nan"], "--seconds nan: must be above zero"),
        (["none.sock", "--seconds", "soon"], "Invalid value for '--seconds'"),
        (["none.sock", "--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
        (["none.sock", "--seed", "4294967296"], "--seed 4294967296: must be from 0 to 4294967295"),
        (["none.sock", "--episode", "3"], "--episode 3: is a number from 0 on, and needs the --seed"),
        (["none.sock", "--seed", "1", "--episode", "-1"], "--episode -1: is a number from 0 on"),
        (["none.sock", "--json", "none/report.json"], "--json none/report.json: there is no directory"),
        (["none.sock", "--json", "."], "--json .: is a directory"),
        (["none.sock", "--what"], "No such option"),
    ],
)
def test_what_the_user_can_mend_is_2(
    arguments: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    assert run(["fuzz", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("hostzero fuzz: error: ")
    assert why in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("control", "why"),
    [
        (
            "none.sock",
            "none.sock: there is no such socket; a device makes one with hostzero device",
        ),
        ("balloon.sock", "the device closed the connection: it has ended, or it is no hostzero device"),
    ],
)
def test_a_control_socket_that_is_none_is_2(
    backend: Backend, control: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = backend.socket.with_name(control)
    assert run(["fuzz", str(backend.socket), "--control", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hostzero fuzz: error: ")
    assert why in shown


def test_an_interrupt_leaves_nothing_behind(backend: Backend, tmp_path: Path) -> None:
    with ControlClient.open(backend.control) as client:
        before = messages(client)  # and this client counts from here on
        watch = Watch(backend.process.pid, None)
        command = [str(backend.socket), "--control", str(backend.control), "--seconds", "600", "--seed", "1"]
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "fuzz", *command, "--json", "report.json"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait_for(lambda: messages(client) > before + 20 or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        assert process.returncode == 130, err
        assert err.splitlines()[-1] == "hostzero fuzz: interrupted"
        assert "Traceback" not in err
        assert out == ""
        assert list(tmp_path.iterdir()) == []
        watch.settled()  # and the device has noticed
    assert run(once(backend)) == 0


def messages(client: ControlClient) -> int:
    """How many messages of front ends a device has read."""
    return int(client.request("metrics")["vhost_user"]["messages"])
