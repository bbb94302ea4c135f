# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from hostzero.errors import VmError
from hostzero.vm.usage import Meter, Usage


def test_the_device_is_the_main_thread_and_the_back_end() -> None:
    used = Usage(main=3.0, backend=2.0, vcpu=7.0, everything=12.5, waited=0.5)
    assert used.device == 5.0
    assert used.since(Usage(1.0, 0.5, 2.0, 4.0, 0.25)) == Usage(2.0, 1.5, 5.0, 8.5, 0.25)


def test_a_thread_that_is_a_virtual_cpu_is_not_the_device() -> None:
    found: list[int] = []
    done = threading.Event()

    def work() -> None:
        found.append(threading.get_native_id())
        while time.thread_time() < 0.2:
            pass
        done.set()
        stop.wait(30)

    stop = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        done.wait(30)
        meter = Meter(os.getpid(), found, None)
        first = meter.read()
        assert first.vcpu >= 0.15
        assert first.backend == 0.0
        assert first.everything >= first.main + first.vcpu - 0.01
        assert first.waited >= 0.0
        begun = time.thread_time()
        while time.thread_time() < begun + 0.1:
            pass
        spent = meter.read().since(first)
        assert spent.main >= 0.05
        assert spent.vcpu < 0.05
    finally:
        stop.set()
        thread.join()


def test_a_back_end_counts_whole_and_its_end_is_said() -> None:
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        meter = Meter(os.getpid(), [], worker.pid)
        used = meter.read()
        assert used.backend >= 0.2
        assert used.device == used.main + used.backend
        worker.communicate(b"\n")
        with pytest.raises(VmError, match="has ended"):
            meter.read()
