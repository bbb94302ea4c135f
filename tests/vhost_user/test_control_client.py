# SPDX-License-Identifier: GPL-2.0-only
"""The client against a real server, and against everything that is no control socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.errors import ControlError, UsageError
from hostzero.vhost_user.control import CLIENTS_MAX
from hostzero.vhost_user.control_client import ANSWER_BYTES_MAX, ControlClient
from tests.device.guest import RAM_BYTES
from tests.vhost_user.control_service import Loop


@pytest.fixture
def path(loop: Loop, tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "ctl"
    with loop.running(where):
        yield where


def answered_by(data: bytes, timeout: float = 10.0) -> ControlClient:
    """Return a client whose server has answered `data` and gone away."""
    ours, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    theirs.close()
    return ControlClient(ours, timeout)


def test_many_requests_over_one_connection(path: Path) -> None:
    with ControlClient.open(path) as client:
        assert client.request("resize", balloon_bytes=4096)["target_bytes"] == 4096
        for _ in range(20):
            assert client.request("status")["device"]["target_bytes"] == 4096


def test_a_wrong_argument_is_the_users(path: Path) -> None:
    with ControlClient.open(path) as client:
        with pytest.raises(UsageError, match="more than the guest has"):
            client.request("resize", guest_bytes=2 * RAM_BYTES)
        assert client.request("status")["device"]["target_bytes"] == 0


def test_what_the_device_refuses_is_no_usage_error(path: Path) -> None:
    with ControlClient.open(path) as client, pytest.raises(ControlError, match="there is no command 'dance'"):
        client.request("dance")


def test_too_many_clients(path: Path) -> None:
    clients = [ControlClient.open(path) for _ in range(CLIENTS_MAX)]
    for client in clients:
        client.request("metrics")
    with ControlClient.open(path) as one_more, pytest.raises(ControlError, match="clients are connected"):
        one_more.request("metrics")
    for client in clients:
        client.close()


def test_no_socket_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no such socket; .* --control PATH"):
        ControlClient.open(tmp_path / "ctl")


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "ctl"))
    with pytest.raises(UsageError, match="no device listens there any more"):
        ControlClient.open(tmp_path / "ctl")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection"),
        (b'{"version":1,"ok":true', "closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n", "is this its control socket"),
        (b"[]\n", "is this its control socket"),
        (b"{}\n", "is this its control socket"),
        (b'{"version":1,"ok":true,"result":[]}\n', "is this its control socket"),
        (b'{"version":1,"ok":false,"error":"no"}\n', "is this its control socket"),
        (b'{"version":9,"ok":true,"result":{}}\n', "speaks version 9"),
        (b'{"version":1,"ok":false,"error":{"kind":"new","message":"no"}}\n', "^no$"),
    ],
    ids=str,
)
def test_an_answer_that_is_none(answer: bytes, message: str) -> None:
    with answered_by(answer) as client, pytest.raises(ControlError, match=message):
        client.request("status")


def test_an_answer_without_end() -> None:
    ours, theirs = socket.socketpair()
    with ControlClient(ours) as client, theirs:
        client._received = b"x" * ANSWER_BYTES_MAX
        theirs.send(b"x")
        with pytest.raises(ControlError, match="longer than"):
            client.request("status")


def test_a_device_that_does_not_answer() -> None:
    ours, theirs = socket.socketpair()
    with ControlClient(ours, timeout=0.01) as client, theirs:
        with pytest.raises(ControlError, match=r"no answer in 0.01 s"):
            client.request("status")
        assert json.loads(theirs.recv(4096)) == {"version": 1, "command": "status"}


def test_a_late_answer_is_not_the_next_one() -> None:
    ours, theirs = socket.socketpair()
    with ControlClient(ours, timeout=0.01) as client, theirs:
        with pytest.raises(ControlError, match="no answer"):
            client.request("status")
        for late in (True, False):
            theirs.sendall(json.dumps({"version": 1, "ok": True, "result": {"late": late}}).encode() + b"\n")
        assert client.request("status") == {"late": False}
