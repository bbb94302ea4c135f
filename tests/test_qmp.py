# SPDX-License-Identifier: GPL-2.0-only
"""Mirror of ``hostzero.qmp``."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import warnings
from pathlib import Path

import pytest
from qemu.qmp.protocol import ConnectError

from hostzero.qmp import Monitor

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}


def answer(path: Path, commands: int, *, waits: bool) -> threading.Thread:
    """Be a QEMU that connects to `path` and answers `commands` commands with nothing."""

    def run() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.connect(str(path))
            end.settimeout(10.0)
            end.sendall(json.dumps(GREETING).encode() + b"\n")
            for _ in range(commands + 1):  # qmp_capabilities comes first
                # A request ends without a newline, and the next one waits for the answer.
                request = json.loads(end.recv(65536))
                reply = {"return": {}} | {key: request[key] for key in request.keys() & {"id"}}
                end.sendall(json.dumps(reply).encode() + b"\n")
            if waits:
                assert end.recv(1) == b""

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("waits", [True, False], ids=["closed here first", "QEMU goes first"])
def test_a_connection_leaves_no_loop_behind(tmp_path: Path, waits: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        monitor = Monitor(tmp_path / "qmp")
        qemu = answer(tmp_path / "qmp", 1, waits=waits)
        monitor.accept(10.0)
        assert monitor.cmd("query-status") == {}
        if not waits:
            qemu.join()
        monitor.close()
        qemu.join()
        monitor.close()
        # A loop that somebody else runs afterwards takes the place of the thread's: the old one is garbage.
        asyncio.run(asyncio.sleep(0))
        del monitor
        gc.collect()
    assert [str(warning.message) for warning in said] == []


def test_nobody_connects(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "qmp")
    with pytest.raises(TimeoutError):
        monitor.accept(0.01)
    monitor.close()


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match="No such file"):
        Monitor(tmp_path / "missing" / "qmp")
