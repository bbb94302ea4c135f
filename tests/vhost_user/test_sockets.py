# SPDX-License-Identifier: GPL-2.0-only
"""Mirror of ``hostzero.vhost_user.sockets``: where a front end may come from, and whose file it is."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from hostzero.errors import UsageError
from hostzero.vhost_user.sockets import (
    SD_LISTEN_FDS_START,
    Endpoint,
    adopt,
    inherited_fd,
    listen,
    open_endpoint,
)
from tests.vhost_user.backend import null_fd, open_fds


def passed(count: str, pid: int | None = None) -> dict[str, str]:
    return {
        "LISTEN_PID": str(os.getpid() if pid is None else pid),
        "LISTEN_FDS": count,
        "LISTEN_FDNAMES": "b",
    }


def a_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


# ---- a path


def test_a_path_is_listened_on_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = open_fds()
    with open_endpoint(path, None) as endpoint:
        assert endpoint.listening
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
    assert not path.exists()
    assert open_fds() == before


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    a_stale_socket(path)
    with listen(path) as sock:
        assert sock.getsockname() == str(path)
    assert not path.exists()


def test_the_file_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(path):
        path.unlink()
        a_stale_socket(path)  # it is another one by now
    assert path.is_socket()


def test_the_file_may_be_gone_at_the_end(tmp_path: Path) -> None:
    with listen(tmp_path / "s"):
        (tmp_path / "s").unlink()


def test_the_mode_is_set_before_anybody_can_connect(tmp_path: Path) -> None:
    with listen(tmp_path / "s", mode=0o600):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_somebody_listens_there_already(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(path):
        with pytest.raises(UsageError, match="another process listens there"), listen(path, "--control"):
            pass
        assert path.is_socket()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(UsageError, match="something is there that is no socket"), listen(path):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing/s", "No such file or directory"), ("x" * 108, "at most 107 bytes")],
)
def test_a_path_that_cannot_be(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--socket-path {path}: .*{message}"), listen(Path(path)):
        pass


# ---- a descriptor


def test_a_connected_socket_is_served_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, open_endpoint(None, theirs.detach()) as endpoint:
        assert not endpoint.listening
        with endpoint.detach() as sock:
            sock.sendall(b"x")
            assert ours.recv(1) == b"x"


def test_a_descriptor_is_not_inherited_by_children() -> None:
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    with ours, adopt(theirs.detach()) as sock:
        assert not os.get_inheritable(sock.fileno())
        assert not Endpoint(sock).listening


@pytest.mark.parametrize("fd", [-1, 1 << 20, 1 << 40])
def test_there_is_no_such_descriptor(fd: int) -> None:
    with pytest.raises(UsageError, match=f"--fd {fd}: there is no such descriptor"):
        adopt(fd)


def test_a_file_is_no_socket() -> None:
    fd = null_fd()
    with pytest.raises(UsageError, match="that descriptor is no socket"):
        adopt(fd)
    os.close(fd)  # it has stayed open


@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_UNIX, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_STREAM)]
)
def test_another_kind_of_socket_stays_open(family: int, kind: int) -> None:
    with socket.socket(family, kind) as sock:
        with pytest.raises(UsageError, match="no Unix stream socket"):
            adopt(sock.fileno())
        sock.getsockname()


# ---- systemd


def test_what_systemd_has_passed_is_found_once() -> None:
    environment = passed("1") | {"HOME": "x"}
    assert inherited_fd(environment) == SD_LISTEN_FDS_START
    assert environment == {"HOME": "x"}
    assert inherited_fd(environment) is None


@pytest.mark.parametrize(
    "environment", [{}, passed("1", pid=1), passed("0"), passed(""), passed("-1"), passed("x")]
)
def test_what_was_passed_to_somebody_else_is_not_ours(environment: dict[str, str]) -> None:
    assert inherited_fd(environment) is None
    assert environment == {}


def test_two_sockets_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="systemd has passed 2 sockets"):
        inherited_fd(passed("2"))


# ---- neither, or both


@pytest.mark.parametrize(
    ("path", "fd", "message"),
    [(None, None, "no socket: give --socket-path PATH or --fd N"), (Path("s"), 3, "give one of them")],
)
def test_one_of_them_has_to_be_given(path: Path | None, fd: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message), open_endpoint(path, fd):
        pass
