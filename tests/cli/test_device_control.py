# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero device`` with a front end, steered and watched from other processes."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostzero.cli.main import run
from hostzero.device import DEFAULT_FEATURES
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.vhost_user.control_client import ControlClient
from hostzero.virtio.features import QueueRole
from tests.vhost_user.front_end import RAM_BYTES, RING_SIZE, SCRATCH_AT, FrontEnd, Memory

LOOKS = 50


class Backend:
    """A running ``hostzero device``."""

    def __init__(self, where: Path) -> None:
        self.socket, self.control = where / "vu.sock", where / "ctl.sock"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hostzero", "device", "--verbose", "--metrics", "0"),
                *("--socket-path", str(self.socket), "--control", str(self.control)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "metrics: " in line:
                self.url = line.partition("metrics: ")[2].strip()
                break

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.socket))
        return sock


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    running = Backend(tmp_path)
    with running.process:
        try:
            yield running
        finally:
            running.process.kill()


@pytest.fixture
def front_end(backend: Backend) -> Iterator[FrontEnd]:
    memory = Memory()
    made = FrontEnd(backend.connect(), memory)
    made.start(DEFAULT_FEATURES)
    yield made
    made.close()
    made.rings.clear()
    memory.close()


@contextmanager
def flooding(front_end: FrontEnd) -> Iterator[None]:
    """Keep the inflate ring full, every other request malformed, and kick without end."""
    ring = front_end.rings[QueueRole.INFLATE]
    front_end.memory.guest.write(Gpa(SCRATCH_AT), bytes(4 * 256))
    heads = [ring.chain([(SCRATCH_AT, 3 if slot % 2 else 4 * 256, 0)], slot) for slot in range(RING_SIZE)]
    ending = threading.Event()

    def flood() -> None:
        while not ending.is_set():
            while (ring.avail_idx - ring.used_idx) & 0xFFFF < RING_SIZE:
                ring.offer(heads[ring.avail_idx % RING_SIZE])
            front_end.kick(QueueRole.INFLATE)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def test_a_device_without_guest_is_steered_too(backend: Backend) -> None:
    with ControlClient.open(backend.control) as client:
        assert client.request("status")["session"] is None
        assert client.request("resize", balloon_bytes=PMD_SIZE)["live"] is False
        front_end = FrontEnd(backend.connect(), Memory())
        front_end.start(DEFAULT_FEATURES)
        assert struct.unpack("<I", front_end.get_config()[:4]) == (PMD_SIZE // PAGE_SIZE,)
        front_end.close()
        front_end.rings.clear()
        front_end.memory.close()


def test_a_resize_reaches_the_guest_and_comes_back(
    backend: Backend, front_end: FrontEnd, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guest has 32 MiB and shall keep 31; it inflates by 256 pages and says so."""
    assert run(["ctl", str(backend.control), "resize", str(RAM_BYTES - (1 << 20)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target_bytes"] == 1 << 20
    front_end.config_changed()
    (num_pages,) = struct.unpack("<I", front_end.get_config()[:4])
    assert num_pages == 256
    front_end.inflate(range(1024, 1024 + num_pages))
    front_end.set_config(num_pages, num_pages)
    arguments = ["resize", str(RAM_BYTES - (1 << 20)), "--wait", "--json"]
    assert run(["ctl", str(backend.control), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["actual_bytes"], result["guest_bytes"]) == (1 << 20, RAM_BYTES - (1 << 20))
    assert run(["top", str(backend.control), "--once", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    inflate = status["metrics"]["device"]["inflate"]
    assert inflate["claimed_zero_bytes"] == 1 << 20
    assert inflate["discard_sizes"] == [0, 0, 0, 1, 0, 0, 0, 0]
    queues = {queue["role"]: queue["running"] for queue in status["session"]["queues"]}
    assert queues["inflate"] is True


def test_text_for_people_about_a_real_session(
    backend: Backend, front_end: FrontEnd, capsys: pytest.CaptureFixture[str]
) -> None:
    front_end.report((2 * PMD_SIZE, PMD_SIZE))
    assert run(["ctl", str(backend.control), "status"]) == 0
    shown = capsys.readouterr().out
    assert "session running; driver running" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"4 reporting running {RING_SIZE} 1 2 MiB 2 MiB" in rows
    assert run(["top", str(backend.control), "--once"]) == 0
    assert run(["ctl", str(backend.control), "metrics"]) == 0


def test_a_guest_that_floods_does_not_keep_anybody_from_an_answer(
    backend: Backend, front_end: FrontEnd
) -> None:
    with ControlClient.open(backend.control) as client, flooding(front_end):
        seen = [client.request("status")["metrics"]["device"]["inflate"] for _ in range(LOOKS)]
        with urllib.request.urlopen(backend.url) as answer:
            assert b"hostzero_queue_malformed_requests_total" in answer.read()
    assert seen[0]["requests"] < seen[-1]["requests"], "the guest did not flood"
    for inflate in seen:
        assert abs(inflate["requests"] - 2 * inflate["malformed"]) <= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_device_that_was_told_to_end(
    backend: Backend, front_end: FrontEnd, number: signal.Signals
) -> None:
    with ControlClient.open(backend.control) as client, flooding(front_end):
        client.request("status")
        backend.process.send_signal(number)
        assert backend.process.wait(30) == (0 if number is signal.SIGTERM else 130)
    assert not backend.socket.exists()
    assert not backend.control.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "FILE"], "--control FILE: something is there that is no socket"),
        (["--metrics", "localhost:1"], "--metrics localhost:1: 'localhost' is no address"),
        (["--metrics", "192.0.2.1:0"], "--metrics: cannot listen on 192.0.2.1 port 0"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "file"
    file.touch()
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    where = str(tmp_path / "vu.sock")
    done = subprocess.run(
        [sys.executable, "-m", "hostzero", "device", "--socket-path", where, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hostzero device: error: {message.replace('FILE', str(file))}")
    assert not Path(where).exists()
