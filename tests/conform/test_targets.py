# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hostzero.conform.in_process import InProcessTarget
from hostzero.conform.qemu import QemuTarget
from hostzero.conform.target import Connection
from hostzero.conform.targets import open_target
from hostzero.conform.vhost_user import VhostUserTarget
from hostzero.errors import UsageError
from tests.conform.stand_in_qemu import script


def test_our_own_core() -> None:
    target = open_target("in-process", backing="anonymous")
    assert isinstance(target, InProcessTarget)
    assert target.describe()["memory"] == "anonymous"
    with target.connect() as connection:
        assert isinstance(connection, Connection)


def test_a_socket_with_and_without_its_prefix(tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        for text in (str(path), f"unix:{path}"):
            target = open_target(text)
            assert isinstance(target, VhostUserTarget)
            assert target.name == f"unix:{path}"


def test_a_path_that_is_no_socket(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no socket; TARGET is"):
        open_target(str(tmp_path))


def test_options_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="--control is for a device behind a socket"):
        open_target("in-process", control=Path("c.sock"))
    with pytest.raises(UsageError, match="--backing anonymous"):
        open_target("unix:b.sock", backing="anonymous")
    with pytest.raises(UsageError, match="--backing paper: choose one of"):
        open_target("in-process", backing="paper")
    with pytest.raises(UsageError, match="TARGET or --qemu PATH is missing"):
        open_target(None)
    with pytest.raises(UsageError, match="--qemu-arg is for --qemu PATH"):
        open_target("in-process", qemu_arguments=["-name"])


def test_a_qemu(tmp_path: Path) -> None:
    program = str(script(tmp_path))
    target = open_target(None, qemu=program, qemu_arguments=["-name", "x"])
    assert isinstance(target, QemuTarget)
    assert target.describe()["arguments"] == "-name x"


def test_options_that_do_not_fit_a_qemu(tmp_path: Path) -> None:
    program = str(script(tmp_path))
    with pytest.raises(UsageError, match="in-process: a run judges one device"):
        open_target("in-process", qemu=program)
    with pytest.raises(UsageError, match="--qemu has QEMU's monitor"):
        open_target(None, qemu=program, control=Path("c.sock"))
    with pytest.raises(UsageError, match="--backing anonymous: QEMU maps guest memory"):
        open_target(None, qemu=program, backing="anonymous")
