# SPDX-License-Identifier: GPL-2.0-only
"""A device in a process of its own, for commands that talk to one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def device_process(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The control socket of a running device, and its process."""
    path = tmp_path / "ctl"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.device_process", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parent.parent.parent,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield path, process
        finally:
            process.kill()


@pytest.fixture
def control(device_process: tuple[Path, subprocess.Popen[str]]) -> Path:
    """The control socket of a running device."""
    return device_process[0]
