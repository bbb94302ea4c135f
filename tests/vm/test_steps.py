# SPDX-License-Identifier: GPL-2.0-only
"""Steps against a guest that is a memfd and a list of commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from hostzero.errors import VmError
from hostzero.units import PAGE_SIZE
from hostzero.vm.guest import Guest
from hostzero.vm.host_memory import HostMemory
from hostzero.vm.steps import (
    MIB,
    checksum,
    dirty_and_free,
    marked_page,
    resize,
    settle,
    wait_backed_below,
    wait_balloon_pages,
    write_command,
)


class FakeAgent:
    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, command: str, seconds: float = 0) -> None:
        self.commands.append(command)

    def read(self, command: str, seconds: float = 0) -> str:
        self.commands.append(command)
        return "abc123  file\n"


class FakeGuest:
    def __init__(self) -> None:
        self.descriptor = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.truncate(self.descriptor, 16 * MIB)
        self.memory = HostMemory(self.descriptor)
        self.agent = FakeAgent()
        self.balloon_pages: Callable[[], int] = lambda: 0


@pytest.fixture
def fake() -> Iterator[FakeGuest]:
    made = FakeGuest()
    yield made
    made.memory.close()


def as_guest(fake: FakeGuest) -> Guest:
    return cast("Guest", fake)


class Slow:
    """A balloon that moves by a page a question."""

    def __init__(self, end: int = 1 << 40) -> None:
        self.target = self.size = 0
        self.end = end

    def resize(self, balloon_bytes: int) -> None:
        self.target = balloon_bytes

    def actual(self) -> int:
        self.size = min(self.size + PAGE_SIZE, self.target, self.end)
        return self.size


def test_resize_waits_until_the_guest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostzero.vm.steps.LOOK_SECONDS", 0)
    balloon, looks = Slow(), []
    resize(balloon, 3 * PAGE_SIZE, look=lambda: looks.append(balloon.size))
    assert looks == [0, PAGE_SIZE, 2 * PAGE_SIZE]


def test_a_target_that_is_not_reached_is_said() -> None:
    with pytest.raises(VmError, match="a balloon of 2 MiB: not within 0 s"):
        resize(Slow(end=MIB), 2 * MIB, seconds=0)


def test_a_marked_page_is_a_page_and_the_command_writes_copies_of_it(tmp_path: Path) -> None:
    assert len(marked_page("x")) == PAGE_SIZE
    command = write_command(str(tmp_path / "file"), "x", 2 * MIB).replace("/run/", f"{tmp_path}/")
    assert os.system(command) == 0
    assert (tmp_path / "file").read_bytes() == marked_page("x") * (2 * MIB // PAGE_SIZE)


def test_commands_for_the_guest(fake: FakeGuest) -> None:
    dirty_and_free(as_guest(fake), 8 * MIB)
    assert f"bs={8 * MIB} count=1" in fake.agent.commands[0]
    assert checksum(as_guest(fake), "/mnt/x") == "abc123"


def test_waiting_for_memory_says_how_much_is_still_backed(fake: FakeGuest) -> None:
    os.pwrite(fake.descriptor, b"x" * 2 * MIB, 0)
    assert wait_backed_below(as_guest(fake), 2 * MIB, 0) == 2 * MIB
    with pytest.raises(VmError, match="2 MiB are backed, not 1"):
        wait_backed_below(as_guest(fake), MIB, 0)


def test_a_balloon_page_that_moves_counts_twice_for_a_while(fake: FakeGuest) -> None:
    counts = iter([8, 8, 7])
    fake.balloon_pages = lambda: next(counts, 9)
    wait_balloon_pages(as_guest(fake), 7, 10)
    with pytest.raises(VmError, match="7 pages in the balloon: not within 0 s: the guest counts 9"):
        wait_balloon_pages(as_guest(fake), 7, 0)


def test_a_device_that_works_does_not_rest(fake: FakeGuest) -> None:
    used = iter([0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    last = 0.0

    def busy() -> float:
        nonlocal last
        last = next(used, 2.0)
        return last

    settle(as_guest(fake), busy, quiet=0.3, seconds=10)
    assert last == 2.0
    worked = iter(range(1000))
    with pytest.raises(VmError, match="comes to rest: not within"):
        settle(as_guest(fake), lambda: float(next(worked)), quiet=0.3, seconds=0.5)
