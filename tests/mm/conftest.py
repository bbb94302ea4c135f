# SPDX-License-Identifier: GPL-2.0-only
"""Booted guests: a plain one, and one made to order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from hostzero.mm import MemoryManager
from tests.mm.guest import booted
from tests.mm.processes import restore
from tests.mm.reporting import scattered_image


class Boot(Protocol):
    """Boots a guest of `mib` MiB with the given `MmConfig` fields; it ends with the test."""

    def __call__(self, mib: int = 8, **config: Any) -> MemoryManager: ...


@pytest.fixture
def boot() -> Iterator[Boot]:
    """A function that boots a small guest over anonymous RAM, debug assertions on."""
    with ExitStack() as guests:

        def boot_one(mib: int = 8, **config: Any) -> MemoryManager:
            return guests.enter_context(booted(mib, **config))

        yield boot_one


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest of 8 MiB with one CPU and debug assertions on."""
    return boot()


@pytest.fixture
def scattered(mm: MemoryManager) -> MemoryManager:
    """A guest with 32 free blocks of order 4 that cannot merge (`reporting.SCATTERED`)."""
    return restore(mm, scattered_image())
