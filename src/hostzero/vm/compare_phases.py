# SPDX-License-Identifier: GPL-2.0-only
"""What is done to the two guests of a comparison, and what of it is measured.

=========  ==============================  ==========================  =============================
phase      before, not measured            measured from               to
=========  ==============================  ==========================  =============================
inflate    a process in the guest writes   the host sets the target    the guest says it is there,
           nearly all free memory, ends                                and the device rests
deflate    (follows inflate)               the host sets the target 0  the same
report     the guest writes a file in      the guest removes the file  the host has half of it back,
           memory, and rests                                           and the device rests
=========  ==============================  ==========================  =============================

The guests of inflate and deflate have no free page reporting: it would give free memory back
before the balloon could, and report what deflate has just returned. So memory that goes into the
balloon is backed on the host beforehand, in both arms, and what is gone afterwards the balloon
has given back.

The figures end where the device comes to `rest`, so that neither the rest nor the question whether
the target is reached is in them.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from hostzero.errors import VmError
from hostzero.vm.backend import guest_with_device
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import Guest
from hostzero.vm.huge_pages import Pool, read_pool
from hostzero.vm.prepared import Prepared
from hostzero.vm.qemu_balloon import guest_with_qemu_balloon
from hostzero.vm.rest import Look, end_of_work, rate_of, rests
from hostzero.vm.steps import MIB, Balloon, dirty_and_free, settle
from hostzero.vm.usage import Meter, Usage

LEFT_FREE: Final = 160 * MIB
"""Free memory that stays unwritten before an inflate, so that the guest has no need to swap or kill."""
_LOOK: Final = 0.05
_BALLOON_QUIET: Final = 0.4
_REPORT_QUIET: Final = 3.0
"""Longer than the two seconds between a guest's reports."""
_PHASE_SECONDS: Final = 300.0

WAITED_FLOOR: Final = 0.05
WAITED_SHARE: Final = 0.05
RULE: Final = (
    f"QEMU's main thread, its vCPU and the back end together were ready to run and waited for a CPU for more "
    f"than max({WAITED_FLOOR:g} s, {WAITED_SHARE:.0%} of wall); the repetition is kept and marked"
)


class ArmName(enum.StrEnum):
    """Whose balloon a guest has."""

    HOSTZERO = "hostzero"
    QEMU = "qemu"


class Phase(enum.StrEnum):
    """What a figure is about."""

    INFLATE = "inflate"
    DEFLATE = "deflate"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Sample:
    """One phase of one arm, once.

    Attributes:
        arm: whose device.
        phase: what was done.
        repetition: from 0 on; those of one number belong together.
        wall: seconds.
        main: CPU seconds of QEMU's main thread; so all the others, as `Usage` has them.
        given_back: bytes by which the host's memory behind the guest has shrunk.
        pool_freed: pages that another program can have from the pool of huge pages now and could
            not before; None on memory of small pages.
    """

    arm: ArmName
    phase: Phase
    repetition: int
    wall: float
    main: float
    backend: float
    vcpu: float
    everything: float
    waited: float
    given_back: int
    pool_freed: int | None = None

    @property
    def device(self) -> float:
        """CPU seconds of the device: QEMU's main thread and the back end."""
        return self.main + self.backend

    @property
    def disturbed(self) -> bool:
        """Whether something else had the CPU (`RULE`, fixed before any run)."""
        return self.waited > max(WAITED_FLOOR, WAITED_SHARE * self.wall)


@dataclass(slots=True)
class Arm:
    """A guest that runs, its balloon, and what both use."""

    name: ArmName
    guest: Guest
    balloon: Balloon
    meter: Meter


@contextmanager
def open_arm(name: ArmName, prepared: Prepared, options: GuestOptions, features: str | None) -> Iterator[Arm]:
    """Yield a guest with its balloon, whose driver is loaded.

    Args:
        name: whose device.
        prepared: QEMU and the guest.
        options: the guest's; `hostzero` and `qemu` of them are chosen here.
        features: what hostzero's device offers, by name; `options.reporting` is for QEMU's.
    """
    ours = name is ArmName.HOSTZERO
    options = replace(options, hostzero=ours, qemu=not ours)
    if ours:
        with guest_with_device(prepared, options, features) as (guest, backend):
            yield _loaded(Arm(name, guest, backend, _meter(guest, backend.pid)))
    else:
        with guest_with_qemu_balloon(prepared, options) as (guest, balloon):
            yield _loaded(Arm(name, guest, balloon, _meter(guest, None)))


def rest(arm: Arm) -> None:
    """Wait until the guest has reported what is free."""
    settle(arm.guest, lambda: arm.meter.read().device)


def balloon_phases(arm: Arm, repetition: int, size: int) -> list[Sample]:
    """Inflate to `size` bytes and deflate to 0.

    Raises:
        VmError: a target is not reached.
    """
    free = int(arm.guest.agent.read("grep MemFree /proc/meminfo").split()[1]) * 1024
    dirty_and_free(arm.guest, (free - LEFT_FREE) // MIB * MIB)
    samples = []
    for phase, target in ((Phase.INFLATE, size), (Phase.DEFLATE, 0)):

        def there(target: int = target) -> bool:
            return arm.balloon.actual() == target

        def ask(target: int = target) -> None:
            arm.balloon.resize(target)

        samples.append(_measure(arm, phase, repetition, ask, there, _BALLOON_QUIET))
    return samples


def report_phase(arm: Arm, repetition: int, size: int) -> list[Sample]:
    """Have the guest free `size` bytes that it has written to, and report them.

    Raises:
        VmError: the memory does not come back.
    """
    agent = arm.guest.agent
    agent.run(f"dd if=/dev/zero of=/mnt/written bs={MIB} count={size // MIB} 2>&1", _PHASE_SECONDS)
    rest(arm)
    # Pieces below 2 MiB are never reported; how many there are the figures say, and not this.
    most = arm.guest.memory.backed() - size // 2

    def free() -> None:
        agent.run("rm /mnt/written")

    def gone() -> bool:
        return arm.guest.memory.backed() <= most

    return [_measure(arm, Phase.REPORT, repetition, free, gone, _REPORT_QUIET)]


def _measure(
    arm: Arm, phase: Phase, repetition: int, act: Callable[[], None], done: Callable[[], bool], quiet: float
) -> Sample:
    huge = arm.guest.options.huge_pages
    pool = read_pool() if huge else Pool(0, 0, 0)
    before = arm.guest.memory.backed()
    started = time.monotonic()
    first = arm.meter.read()
    act()
    used, active, backed = follow(
        arm.meter.read, arm.guest.memory.backed, done, quiet, phase, seconds=_PHASE_SECONDS
    )
    spent = used.since(first)
    freed = read_pool().available - pool.available if huge else None
    given_back = before - backed
    return Sample(
        arm.name, phase, repetition, active - started, *spent, given_back=given_back, pool_freed=freed
    )


def follow(
    read: Callable[[], Usage],
    backed: Callable[[], int],
    done: Callable[[], bool],
    quiet: float,
    what: str,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[Usage, float, int]:
    """Watch a device until it is `done` and has rested for `quiet` seconds, before and after it is asked.

    Args:
        read: what has been used so far.
        backed: bytes that the host has backed; a change of 1 MiB is work, too.
        done: whether what was asked for is there; asked only when the device seems to rest, as an
            answer costs it.
        quiet: seconds.
        what: for the error.
        seconds: how long to wait.
        clock: tells the time, in seconds.
        pause: lets time pass.

    Returns:
        What was used up to the last moment at which it did not rest, that moment, and the bytes
        that are backed now.

    Raises:
        VmError: it is not done in time.
    """
    used: list[Usage] = []
    looks: list[Look] = []
    asked: int | None = None
    while True:
        used.append(read())
        looks.append(Look(clock(), used[-1].device, backed()))
        if asked is None:
            if rests(looks, quiet) and done():
                asked = len(looks)
        elif len(after := looks[asked + 1 :]) > 1 and after[-1].at - after[0].at >= quiet:
            # A device with little to do seems to rest while it works: what a rest is tells the one
            # after the end, which has the answer's cost not in it.
            if rests(after, quiet):
                end = end_of_work(looks[:asked], rate_of(after))
                return used[end], looks[end].at, looks[-1].backed
            asked = None
        if looks[-1].at - looks[0].at >= seconds:
            raise VmError(f"{what}: not done within {seconds:g} s")
        pause(_LOOK)


def _meter(guest: Guest, backend: int | None) -> Meter:
    vcpus = [int(cpu["thread-id"]) for cpu in guest.qmp("query-cpus-fast")]
    return Meter(guest.pid, vcpus, backend)


def _loaded(arm: Arm) -> Arm:
    arm.guest.load_driver()
    return arm
