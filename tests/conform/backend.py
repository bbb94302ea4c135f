# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero device`` in a process of its own, with a control socket: what the suite is tried on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Backend(NamedTuple):
    """A running device."""

    process: subprocess.Popen[bytes]
    socket: Path
    control: Path


@contextmanager
def running(
    folder: Path, *, may_end: bool = False, program: Sequence[str] = ("-m", "hostzero")
) -> Iterator[Backend]:
    """Run a device that offers everything; it has to be there still at the end, unless it may end.

    Its log is the file `device.log` in `folder`. `program` is what Python runs, instead of hostzero.
    """
    socket, control = folder / "balloon.sock", folder / "control.sock"
    arguments = ["--socket-path", str(socket), "--control", str(control), "--features"]
    with (folder / "device.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, "device", *arguments, "+must-tell-host,+page-poison"], stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while not {str(socket), str(control)} <= listening():
            assert process.poll() is None, "the device ended"
            assert time.monotonic() < deadline, "the device made no sockets"
            time.sleep(0.02)
        yield Backend(process, socket, control)
        assert may_end or process.poll() is None, "the device ended"
    finally:
        process.terminate()
        process.wait()


def listening() -> set[str]:
    """The paths on which anybody listens; a socket's file is there a moment before that."""
    sockets = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()]
    # __SO_ACCEPTCON among the flags; a socket without a path has no eighth field.
    return {fields[7] for fields in sockets if len(fields) == 8 and fields[3] == "00010000"}
