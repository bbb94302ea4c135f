# SPDX-License-Identifier: GPL-2.0-only
"""A region per backing that this machine has, and system calls that must not happen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.ram import Ram, libc, open_ram
from tests.ram.host import AVAILABLE, SIZE


@pytest.fixture(params=AVAILABLE)
def ram(request: pytest.FixtureRequest) -> Iterator[Ram]:
    """8 MiB of guest RAM, once per backing."""
    with open_ram(SIZE, request.param) as region:
        yield region


@pytest.fixture
def no_discard_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any call that could discard memory fail the test."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a system call was made: {arguments}")

    monkeypatch.setattr(libc, "madvise", refuse)
    monkeypatch.setattr(libc, "punch_hole", refuse)
