# SPDX-License-Identifier: GPL-2.0-only
"""The control socket in a loop: who may come in, what a bad client costs, and a guest that floods."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.device import BalloonDevice
from hostzero.errors import UsageError
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
    loop.server.listen(where)
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


# ------------------------------------------------------------- the socket file


def test_only_the_owner_may_connect(path: Path) -> None:
    mode = path.lstat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_umask_that_would_allow_everybody_changes_nothing(loop: Loop, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        loop.server.listen(tmp_path / "ctl")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ctl").lstat().st_mode) == 0o600


def test_the_socket_goes_with_the_server(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        loop.settle()
        loop.server.close()
        assert not path.exists()
        assert ended(client)
    loop.server.close()


def test_a_file_that_took_its_place_stays(loop: Loop, path: Path) -> None:
    path.unlink()
    path.write_text("mine")
    loop.server.close()
    assert path.read_text() == "mine"


def test_the_socket_of_a_killed_device_is_replaced(loop: Loop, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    loop.server.listen(path)
    with dial(path) as client:
        client.send(METRICS)
        loop.settle()
        assert read(client)[0]["ok"]


def test_the_socket_of_another_device_is_left_alone(service: FakeService, path: Path) -> None:
    other = Loop(service)
    with pytest.raises(UsageError, match="in use by another program"):
        other.server.listen(path)
    other.close()
    with dial(path):
        pass


def test_a_file_is_left_alone(loop: Loop, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is no socket"):
        loop.server.listen(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["missing/ctl", "x" * 120])
def test_a_path_that_cannot_be_is_a_usage_error(loop: Loop, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot make the control socket"):
        loop.server.listen(tmp_path / name)


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


def test_one_event_leads_to_one_answer(loop: Loop, path: Path) -> None:
    """A client that sends many requests at once gets no more of the loop than one that asks once."""
    with dial(path) as greedy, dial(path) as modest:
        loop.turn()  # the listener takes one connection an event
        loop.turn()
        greedy.send(b"{}\n" * 20)
        modest.send(METRICS)
        loop.turn()
        assert len(read(greedy)) == 1
        assert len(read(modest)) == 1
        loop.settle()
        assert len(read(greedy)) == 19


def test_a_client_that_closes_its_end_has_its_answer_first(loop: Loop, path: Path) -> None:
    with dial(path) as client:
        client.send(METRICS * 3)
        client.shutdown(socket.SHUT_WR)
        loop.settle()
        assert len(read(client)) == 3
        assert ended(client)


def test_a_client_that_goes_away_is_forgotten(loop: Loop, path: Path) -> None:
    before = len(loop.selector.get_map())
    with dial(path) as client:
        loop.settle()
        client.send(METRICS * 20)
        assert len(loop.selector.get_map()) == before + 1
    loop.settle()
    assert len(loop.selector.get_map()) == before


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
    with loop.server.connect() as client:
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
    with loop.server.connect() as client, loop.server.connect() as other:
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
    """The loop turns between two batches of the guest, and an answer takes one turn."""
    with dial(path) as client:
        loop.settle()
        guest.write_pfns([0] * 256)
        for turns in range(50):
            while guest.rings[QueueRole.INFLATE].returned():
                pass
            for slot in range(64):
                guest.put(QueueRole.INFLATE, [(PFNS_AT, 4 * 256 if slot % 2 else 3)], first=slot)
            guest.kick(QueueRole.INFLATE)
            client.send(STATUS)
            loop.turn()
            (status,) = read(client)
            inflate = status["result"]["metrics"]["device"]["inflate"]
            assert inflate["requests"] == 64 * (turns + 1)
            assert inflate["malformed"] == 32 * (turns + 1)
            assert inflate["pfns"] == 32 * 256 * (turns + 1)
