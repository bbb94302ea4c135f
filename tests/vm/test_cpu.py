# SPDX-License-Identifier: GPL-2.0-only
"""CPU time of others, compared with what this process knows of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostzero.errors import VmError
from hostzero.vm.cpu import process_seconds, thread_seconds, thread_waited, threads


def test_this_process_s_time_lies_between_two_of_its_own_readings() -> None:
    before = time.process_time()
    found = process_seconds(os.getpid())
    assert before <= found <= time.process_time()


def test_another_process_s_time_counts_its_work() -> None:
    code = "import sys, time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert process_seconds(worker.pid) >= 0.2
        assert thread_seconds(worker.pid, worker.pid) >= 0.15
        worker.communicate()


def test_a_process_that_is_gone_is_said() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with pytest.raises(VmError, match="has ended"):
            process_seconds(process.pid)
        with pytest.raises(VmError, match="no CPU time"):
            thread_seconds(process.pid, process.pid)


def test_a_thread_s_times_are_the_numbers_of_schedstat(tmp_path: Path) -> None:
    path = tmp_path / "7/task/8"
    path.mkdir(parents=True)
    (path / "schedstat").write_text("1500000000 2500000 3\n")
    assert thread_seconds(7, 8, root=tmp_path) == 1.5
    assert thread_waited(7, 8, root=tmp_path) == 0.0025


def test_the_threads_of_a_process(tmp_path: Path) -> None:
    for number in (12, 9, 100):
        (tmp_path / "9/task" / str(number)).mkdir(parents=True)
    assert threads(9, root=tmp_path) == [9, 12, 100]
    with pytest.raises(VmError, match="has ended"):
        threads(10, root=tmp_path)
