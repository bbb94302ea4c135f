# SPDX-License-Identifier: GPL-2.0-only
"""Phases with a guest that a script is, and a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.errors import VmError
from hostzero.vm import compare_phases
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.compare_phases import (
    WAITED_FLOOR,
    ArmName,
    Phase,
    balloon_phases,
    follow,
    open_arm,
    report_phase,
)
from hostzero.vm.steps import MIB
from hostzero.vm.usage import Usage
from tests.vm.samples import sample
from tests.vm.stand_in import prepared_with, write_qemu


class World:
    """A device whose CPU time is a list of what it uses in each look, 1 s apart."""

    def __init__(self, used: list[float], backed: list[int] | None = None) -> None:
        self.now = 0.0
        self.used = used
        self.sizes = backed or [0]

    def read(self) -> Usage:
        total = sum(self.used[: int(self.now)])
        return Usage(total, 0.0, 0.0, total, 0.0)

    def backed(self) -> int:
        return self.sizes[min(int(self.now), len(self.sizes) - 1)]

    def pause(self, seconds: float) -> None:
        self.now += 1.0

    def follow(self, done: Iterator[bool], quiet: float) -> tuple[Usage, float, int]:
        return follow(
            self.read,
            self.backed,
            lambda: next(done),
            quiet,
            "it",
            seconds=20,
            clock=lambda: self.now,
            pause=self.pause,
        )


def test_figures_end_with_the_last_work_before_a_rest() -> None:
    world = World([0.5, 0.5, *[0.001] * 10])
    used, active, _ = world.follow(iter([True]), 3.0)
    assert (used.device, active) == (1.0, 2.0)


def test_work_that_is_little_is_no_rest_before_the_end() -> None:
    """It uses as little as a rest may; the rest that counts begins when it is done."""
    world = World([0.04] * 6 + [0.0] * 10)
    used, active, _ = world.follow(iter([False] * 4 + [True]), 2.0)
    assert used.device == pytest.approx(0.24)
    assert active == 6.0


def test_a_rest_that_is_no_end_is_followed_further() -> None:
    world = World([0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    used, active, _ = world.follow(iter([False, True]), 2.0)
    assert (used.device, active) == (1.0, 4.0)


def test_memory_that_goes_is_work_too() -> None:
    world = World([0.0] * 9, [64 * MIB, 64 * MIB, 64 * MIB, 32 * MIB, 32 * MIB])
    assert world.follow(iter([True]), 2.5)[1:] == (3.0, 32 * MIB)


def test_what_does_not_end_has_a_deadline() -> None:
    with pytest.raises(VmError, match="it: not done within 20 s"):
        World([0.5] * 100).follow(iter([]), 2.0)


def test_a_repetition_is_disturbed_by_waiting_beyond_floor_and_share() -> None:
    def disturbed(wall: float, waited: float) -> bool:
        return sample(ArmName.QEMU, Phase.INFLATE, 0, main=1.0, wall=wall, waited=waited).disturbed

    assert not disturbed(0.1, WAITED_FLOOR)
    assert disturbed(0.1, WAITED_FLOOR + 0.01)
    assert not disturbed(10.0, 0.5)
    assert disturbed(10.0, 0.51)


ANSWERS = {
    "insmod /virtio_balloon.ko": "",
    "grep MemFree /proc/meminfo": f"MemFree: {300 * 1024} kB\n",
    f"dd if=/dev/zero of=/dev/null bs={140 * MIB} count=1 iflag=fullblock 2>&1": "",
    f"dd if=/dev/zero of=/mnt/written bs={MIB} count=8 2>&1": "",
    "rm /mnt/written": "",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_phases, "_BALLOON_QUIET", 0.1)
    monkeypatch.setattr(compare_phases, "_PHASE_SECONDS", 5.0)
    monkeypatch.setattr(compare_phases, "rest", lambda arm: None)


@pytest.mark.usefixtures("quick")
def test_a_guest_with_qemu_s_balloon_goes_through_its_phases(tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu", answers=ANSWERS))
    options = GuestOptions(memory=64 * MIB)
    with open_arm(ArmName.QEMU, prepared, options, None) as arm:
        assert (arm.guest.options.hostzero, arm.guest.options.qemu) == (False, True)
        inflate, deflate = balloon_phases(arm, 3, 16 * MIB)
        assert (inflate.phase, inflate.repetition, inflate.arm) == (Phase.INFLATE, 3, ArmName.QEMU)
        assert deflate.phase is Phase.DEFLATE
        assert arm.balloon.actual() == 0
        assert inflate.backend == 0.0
        assert inflate.pool_freed is None
        # Its memory is never backed, so nothing can come back.
        with pytest.raises(VmError, match="report: not done within 5 s"):
            report_phase(arm, 0, 8 * MIB)
