# SPDX-License-Identifier: GPL-2.0-only
"""Who is served; how sessions follow one another is in `test_session`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostzero.vhost_user.connection import Peer
from hostzero.vhost_user.server import describe


@contextmanager
def named(name: bytes) -> Iterator[None]:
    """Call this process `name` for a while."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes(name)
    try:
        yield
    finally:
        comm.write_bytes(before.rstrip(b"\n"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"qemu-system-x86", "qemu-system-x86"),
        (b"CPU 0/KVM", "CPU 0/KVM"),
        (b"x\nhostzero: y", r"x\x0ahostzero: y"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"\xff\xfename", r"\xff\xfename"),
        (b"q\xc3\xa9mu", r"q\xc3\xa9mu"),
    ],
)
def test_a_peer_is_called_by_its_name_whatever_that_is(name: bytes, shown: str) -> None:
    with named(name):
        assert describe(Peer(os.getpid(), 0, 0)) == f"{shown} {os.getpid()}"


def test_a_peer_that_is_gone_or_out_of_sight_is_a_number() -> None:
    assert describe(Peer(0, 0, 0)) == "pid 0"
