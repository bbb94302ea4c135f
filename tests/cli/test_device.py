# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero device`` as a process: QEMU's conventions for backends, systemd's, and how it ends.

What it does to a guest is in `tests/vhost_user`; steering it in `test_device_control`.
"""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostzero.cli import device
from hostzero.cli.main import run
from hostzero.vhost_user.messages import HEADER, VERSION
from hostzero.vhost_user.protocol import Request

PROGRAM = [sys.executable, "-m", "hostzero", "device"]

# What systemd does: descriptor 3 is the socket, and the process that it is for has its number.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "hostzero", "device"])
"""


# A terminal's hangup, whatever these tests run under: as it is, or ignored as under nohup.
HANGUP = """
import signal, sys
signal.signal(signal.SIGHUP, getattr(signal, sys.argv.pop(1)))
from hostzero.cli.main import main
main()
"""


def started(command: Sequence[str], fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(command, pass_fds=fds, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def has_features(sock: socket.socket) -> bool:
    """Ask for features, as a front end does first; False if the other end has closed."""
    sock.settimeout(30)
    sock.sendall(HEADER.pack(Request.GET_FEATURES, VERSION, 0))
    return len(sock.recv(HEADER.size + 8, socket.MSG_WAITALL)) == HEADER.size + 8


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + 30
    while sock.connect_ex(str(path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return sock


def test_its_capabilities_are_those_of_the_schema() -> None:
    done = subprocess.run([*PROGRAM, "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"type": "balloon", "features": []}
    assert done.stderr == ""


def test_its_description_names_a_program_that_is_there() -> None:
    done = subprocess.run([*PROGRAM, "--print-description"], capture_output=True, text=True, check=True)
    binary = json.loads(done.stdout)["binary"]
    there = subprocess.run([binary, "--print-capabilities"], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout)["type"] == "balloon"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder; the program is not in any of the places where it is looked for."""
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "hostzero")])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python3"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path / scheme))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path


@pytest.mark.parametrize("folder", ["bin", "python", sysconfig.get_preferred_scheme("user"), "path"])
def test_the_program_is_found_where_it_is(nowhere: Path, folder: str) -> None:
    program = nowhere / folder / "hostzero-device"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    assert device.find_program() == program


def test_a_program_that_is_not_there_is_not_described(
    nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (nowhere / "bin").mkdir()
    (nowhere / "bin" / "hostzero-device").write_text("may not be run")
    assert run(["device", "--print-description"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--print-description: there is no program hostzero-device" in captured.err


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGHUP", "SIGINT"],
)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a session"])
def test_a_signal_ends_it_and_leaves_nothing(
    number: signal.Signals, status: int, busy: bool, tmp_path: Path
) -> None:
    path, control = tmp_path / "s", tmp_path / "c"
    program = [sys.executable, "-c", HANGUP, "SIG_DFL", "device"]
    process = started([*program, "--socket-path", str(path), "--control", str(control)])
    with connected(path) as sock:
        assert has_features(sock)
        if not busy:
            sock.close()
            with connected(path) as another:
                assert has_features(another)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == ""
    assert ("interrupted" in err) == (number == signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_a_hangup_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = started([sys.executable, "-c", HANGUP, "SIG_IGN", "device", "--socket-path", str(path)])
    with connected(path) as sock:
        assert has_features(sock)
        process.send_signal(signal.SIGHUP)
    with connected(path) as another:
        assert has_features(another)
    process.terminate()
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_the_port_of_the_metrics_is_told(tmp_path: Path) -> None:
    process = started([*PROGRAM, "--socket-path", str(tmp_path / "s"), "--metrics", "0"])
    with process:
        assert process.stderr is not None
        ready, _, _ = select.select([process.stderr], [], [], 30)
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert ready
    assert re.fullmatch(r"hostzero device: metrics: http://127\.0\.0\.1:\d+/metrics\n", err)


def test_a_connected_descriptor_is_served_until_its_end() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = started([*PROGRAM, "--fd", str(theirs.fileno())], [theirs.fileno()])
        assert has_features(ours)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_a_listening_descriptor_serves_one_after_the_other(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        process = started([*PROGRAM, "--fd", str(listener.fileno())], [listener.fileno()])
    for _ in range(3):
        with connected(tmp_path / "s") as sock:
            assert has_features(sock)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "s").is_socket()  # whoever made the file removes it


def test_systemd_may_start_it_with_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        command = [sys.executable, "-c", ACTIVATE, str(listener.fileno())]
        process = started(command, [listener.fileno()])
    with connected(tmp_path / "s") as sock:
        assert has_features(sock)
        assert str(Path(f"/proc/{process.pid}/fd/3").readlink()).startswith("socket:")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
