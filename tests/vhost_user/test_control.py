# SPDX-License-Identifier: GPL-2.0-only
"""The control socket in a loop: who may come in, what a bad client costs, and a guest that floods."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device import BalloonDevice
from hostzero.ram import GuestMemory
from hostzero.vhost_user.control import CLIENTS_MAX
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX
from hostzero.virtio.features import QueueRole
from tests.device.guest import PFNS_AT, Guest
from tests.vhost_user.control_service import FakeService, Loop

STATUS = b'{"version":1,"command":"status"}\n'
METRICS = b'{"version":1,"command":"metrics"}\n'


@pytest.fixture
def path(loop: Loop, tmp_path: Path) -> Path:
    where = tmp_path / "ctl"
    loop.listen(where)
    return where


def dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    sock.setblocking(False)
    return sock


def read(sock: socket.socket) -> list[dict[str, Any]]:
    """Return every answer that has come, which have to be whole ones."""
    data = b""
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except BlockingIOError:
        pass
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_every_client_goes_with_the_server(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        loop.settle()
        loop.run(loop.server.close())
        loop.settle()
        assert ended(client)
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(path))
    loop.run(loop.server.close())


# ------------------------------------------------------------- clients


def test_requests_are_answered_in_their_order(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        client.send(STATUS + b"nonsense\n" + METRICS + STATUS[:10])
        loop.settle()
        assert [answer["ok"] for answer in read(client)] == [True, False, True]
        client.send(STATUS[10:])
        loop.settle()
        (status,) = read(client)
        assert status["result"]["session"]["state"] == "running"


def test_a_client_that_asks_a_lot_lets_others_have_their_turn(loop: Loop, path: Path) -> None:
    with dial(path) as greedy, dial(path) as modest:
        loop.settle()
        greedy.send(b"{}\n" * 60)
        modest.send(METRICS)
        turns = 0
        while not read(modest):
            loop.turn()
            turns += 1
        assert len(read(greedy)) <= turns
        loop.settle()
        assert loop.server.commands.metrics.requests == 61


def test_a_client_that_closes_its_end_has_its_answer_first(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        client.send(METRICS * 3)
        client.shutdown(socket.SHUT_WR)
        loop.settle()
        assert len(read(client)) == 3
        assert ended(client)


def test_a_client_that_goes_away_is_forgotten(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        loop.settle()
        client.send(METRICS * 20)
        assert len(loop.server._clients) == 1
    loop.settle()
    assert not loop.server._clients


def test_a_line_without_end_costs_its_client(loop: Loop, path: Path) -> None:
    with dial(path) as client, dial(path) as other:
        client.send(b"x" * LINE_BYTES_MAX)
        loop.settle()
        (answer,) = read(client)
        assert answer["error"]["message"] == f"a request has at most {LINE_BYTES_MAX} bytes"
        assert ended(client)
        other.send(METRICS)
        loop.settle()
        assert read(other)[0]["ok"]


def test_the_longest_line_is_read(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        client.send(METRICS[:-1].ljust(LINE_BYTES_MAX - 1) + b"\n")
        loop.settle()
        assert read(client)[0]["ok"]


def test_a_client_that_does_not_read_is_not_read_either(loop: Loop, path: Path) -> None:
    """Its requests stay in its own socket buffer, and its answers do not grow in the device."""
    with dial(path) as client, dial(path) as other:
        sent = 0
        try:
            while True:
                sent += client.send(STATUS)
                loop.turn()
        except BlockingIOError:
            pass
        loop.settle()
        answered = loop.server.commands.metrics.requests
        assert answered < sent // len(STATUS), "the device went on reading"
        loop.settle()
        assert loop.server.commands.metrics.requests == answered
        other.send(METRICS)
        loop.settle()
        assert read(other)[0]["ok"]


def test_too_many_clients_are_told_so(loop: Loop, path: Path) -> None:
    clients = []
    for _ in range(CLIENTS_MAX):
        clients.append(dial(path))
        loop.settle()
    with dial(path) as one_more:
        loop.settle()
        (answer,) = read(one_more)
        assert answer["error"]["kind"] == "busy"
        assert ended(one_more)
    clients.pop().close()
    loop.settle()
    with dial(path) as next_one:
        next_one.send(METRICS)
        loop.settle()
        control = read(next_one)[0]["result"]["control"]
        assert (control["clients"], control["refused_clients"]) == (CLIENTS_MAX + 1, 1)
    for client in clients:
        client.close()


def test_no_descriptor_is_lost(loop: Loop, path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count, not paths

    before = descriptors()
    for number in range(200):
        with dial(path) as client:
            client.send(METRICS if number % 2 else b"x" * LINE_BYTES_MAX)
            loop.settle()
        loop.settle()
    assert descriptors() == before


def test_a_client_inside_the_process(loop: Loop) -> None:
    with loop.run(loop.server.connect()) as client:
        client.setblocking(False)
        client.send(METRICS)
        loop.settle()
        assert read(client)[0]["ok"]
    loop.settle()


@given(
    st.lists(st.binary(min_size=1, max_size=60) | st.sampled_from([STATUS, b"\n", STATUS[:9], b"x" * 4096]))
)
def test_any_bytes_cost_their_client_at_most(chunks: list[bytes]) -> None:
    """Whatever arrives in whatever pieces, there are whole answers, and others are served."""
    loop = Loop(FakeService(BalloonDevice(GuestMemory([]))))
    with loop.run(loop.server.connect()) as client, loop.run(loop.server.connect()) as other:
        client.setblocking(False)
        other.setblocking(False)
        answers = 0
        try:
            for chunk in chunks:
                client.send(chunk)
                loop.settle()
                answers += len(read(client))
        except (BrokenPipeError, ConnectionResetError):
            pass
        lines = b"".join(chunks).count(b"\n")
        assert answers <= lines + 1
        other.send(METRICS)
        loop.settle()
        assert read(other)[0]["ok"]
    loop.settle()
    loop.close()


# ------------------------------------------------------------- a guest that floods


def test_status_is_answered_while_a_guest_floods(loop: Loop, path: Path, guest: Guest) -> None:
    """A batch of the guest's requests between any two turns does not put an answer off."""
    batches = 0

    def flood() -> None:
        nonlocal batches
        batches += 1
        for slot in range(64):
            guest.put(QueueRole.INFLATE, [(PFNS_AT, 4 * 256 if slot % 2 else 3)], first=slot)
        guest.kick(QueueRole.INFLATE)
        assert len(guest.rings[QueueRole.INFLATE].returned()) == 64

    with dial(path) as client:
        loop.settle()
        guest.write_pfns([0] * 256)
        for _ in range(20):
            client.send(STATUS)
            answers: list[dict[str, Any]] = []
            for _ in range(4):
                flood()
                loop.turn()
                answers += read(client)
            (status,) = answers
            inflate = status["result"]["metrics"]["device"]["inflate"]
            assert inflate["requests"] >= 64 * (batches - 3)
            assert inflate["malformed"] * 2 == inflate["requests"]
