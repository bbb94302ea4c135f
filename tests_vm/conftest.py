# SPDX-License-Identifier: GPL-2.0-only
"""Real virtual machines for `make test-vm`: each test boots its own guest.

`hostzero vm setup` must have run; what it prepared is looked for in HOSTZERO_VM_CACHE, or in
the user's cache. Guests run under KVM where a guest boots with it, else under software
emulation, where everything takes about ten times as long; the deadlines are for that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from hostzero.vm.accel import Accel, choose
from hostzero.vm.backend import Backend, guest_with_device
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import Guest
from hostzero.vm.prepared import Prepared, default_cache, load
from hostzero.vm.progress import Lines

Start = Callable[..., AbstractContextManager[tuple[Guest, Backend]]]


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    configured = os.environ.get("HOSTZERO_VM_CACHE")
    return load(Path(configured) if configured else default_cache())


@pytest.fixture(scope="session")
def accel(prepared: Prepared) -> Accel:
    return choose(prepared, "auto", Lines(sys.stderr))


def pytest_report_header() -> str:
    configured = os.environ.get("HOSTZERO_VM_CACHE")
    return f"virtual machines from: {configured or default_cache()}"


@pytest.fixture
def start(prepared: Prepared, accel: Accel) -> Start:
    """Start a guest with our device: ``with start("init_on_free=1", features=...) as (guest, backend)``."""

    @contextmanager
    def started(append: str = "", features: str | None = None) -> Iterator[tuple[Guest, Backend]]:
        options = GuestOptions(accel=accel.name, append=f"quiet iomem=relaxed {append}")
        with guest_with_device(prepared, options, features) as (guest, backend):
            yield guest, backend
            assert backend.alive, f"the device has ended: {backend.last_words()}"

    return started
