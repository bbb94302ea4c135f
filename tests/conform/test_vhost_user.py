# SPDX-License-Identifier: GPL-2.0-only
"""The whole suite over a socket, against ``hostzero device``; and backends that are none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.conform.case import Case
from hostzero.conform.judge import Level
from hostzero.conform.result import Outcome
from hostzero.conform.run import run_case
from hostzero.conform.suite import all_cases, select
from hostzero.conform.target import Ability, Connection
from hostzero.conform.vhost_user import VhostUserTarget
from hostzero.errors import UsageError
from tests.conform.backend import Backend, running

CASES = all_cases()
NOT_HERE = {"inflate-huge-host-page"}
"""Needs host pages of 2 MiB."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with running(tmp_path_factory.mktemp("backend")) as backend:
        yield backend


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_our_device_passes_over_a_socket(backend: Backend, case: Case) -> None:
    result = run_case(VhostUserTarget(backend.socket, backend.control), case)
    expected = Outcome.NOT_APPLICABLE if case.id in NOT_HERE else Outcome.PASS
    assert result.outcome is expected, [*result.misses, *result.transcript]


def test_without_a_control_socket_the_host_side_is_missing(backend: Backend) -> None:
    (case,) = select(["stats-request"])
    result = run_case(VhostUserTarget(backend.socket), case)
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert "--control" in result.reason


def test_a_connection_is_what_the_contract_says(backend: Backend) -> None:
    target = VhostUserTarget(backend.socket, backend.control)
    assert target.name == f"unix:{backend.socket}"
    with target.connect() as connection:
        assert isinstance(connection, Connection)
        assert connection.missing == {}
        assert connection.alive()
        assert len(connection.memory.regions) == 2
    assert "REPLY_ACK" in target.describe()["protocol features"]


def test_descriptors_do_not_leak(backend: Backend) -> None:
    (case,) = select(["negotiate-subsets"])
    target = VhostUserTarget(backend.socket, backend.control)
    run_case(target, case)
    before = len(list(Path("/proc/self/fd").iterdir()))
    run_case(target, case)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_device_that_is_killed_is_a_finding(tmp_path: Path) -> None:
    with running(tmp_path, may_end=True) as backend:
        target = VhostUserTarget(backend.socket)
        (case,) = select(["inflate-one"])

        def run(rig: object) -> None:
            backend.process.kill()
            backend.process.wait()
            case.run(rig)  # type: ignore[arg-type]

        result = run_case(target, Case("killed", "it lives", "2.1", __name__, run))
        assert result.outcome is Outcome.FAIL
        assert result.level is Level.SAFETY
        assert "went away" in result.misses[0].text


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend listens"):
        VhostUserTarget(tmp_path / "nobody.sock").connect()


def test_a_listener_that_answers_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "nonsense.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                # A reply to GET_FEATURES without bit 30.
                peer.sendall(b"\1\0\0\0\5\0\0\0\x08\0\0\0" + bytes(8))
                peer.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(UsageError, match="no protocol features"):
                VhostUserTarget(path).connect()
        finally:
            thread.join()


def test_an_ability_has_a_sentence() -> None:
    assert all(ability.value for ability in Ability)
