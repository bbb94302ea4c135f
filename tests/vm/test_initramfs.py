# SPDX-License-Identifier: GPL-2.0-only
"""The root file system has what its init script calls."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

from hostzero.vm.agent import parse_header
from hostzero.vm.initramfs import INIT, MODULE, build
from tests.vm.test_cpio import read_back


def test_it_holds_busybox_the_module_and_init() -> None:
    files = read_back(gzip.decompress(build(b"BUSYBOX", b"MODULE")))
    assert files["bin/busybox"][1] == b"BUSYBOX"
    assert files["bin/busybox"][0] & 0o111
    assert files[MODULE][1] == b"MODULE"
    assert files["init"][0] & 0o111
    assert files["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert {"dev/console", "dev/null", "proc", "sys", "mnt"} <= files.keys()


def test_the_same_input_gives_the_same_bytes() -> None:
    assert build(b"a", b"b") == build(b"a", b"b")


def test_the_loop_of_init_speaks_the_agent_s_protocol(tmp_path: Path) -> None:
    """The part of the script that answers commands, run by a shell of this machine."""
    shell = shutil.which("sh")
    assert shell is not None
    loop = INIT[INIT.index('echo "@ready') :].replace("/run/answer", "answer")
    commands = "1 echo hello\n2 false\n3 echo 'a  b'; exit 7\n"
    done = subprocess.run(
        [shell, "-c", loop], input=commands, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    headers = [parse_header(line.encode()) for line in lines]
    assert headers == [("ready", 0, 0), ("1", 0, 6), None, ("2", 1, 0), ("3", 7, 5), None]
    assert lines[2] == "hello"
    assert lines[5] == "a  b"


def test_init_leaves_the_driver_to_the_host() -> None:
    assert "insmod" not in INIT
