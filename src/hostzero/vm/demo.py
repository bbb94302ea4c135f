# SPDX-License-Identifier: GPL-2.0-only
"""`hostzero vm run`: one guest, one device, and what happens between them, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from hostzero.errors import VmError
from hostzero.units import PAGE_SIZE
from hostzero.vm.accel import Accel
from hostzero.vm.agent import Unanswered
from hostzero.vm.backend import Backend, guest_with_device
from hostzero.vm.command_line import HOSTZERO_SLOT, MEMORY, GuestOptions
from hostzero.vm.guest import Guest
from hostzero.vm.pci import offered_features
from hostzero.vm.prepared import Prepared
from hostzero.vm.steps import (
    MIB,
    SLACK,
    dirty_and_free,
    resize,
    settle,
    wait_backed_below,
    wait_balloon_pages,
    write_command,
)
from hostzero.vm.wait import wait_for

REPORT: Final = 512 * MIB
INFLATE: Final = 1024 * MIB
MEMORY_MIN: Final = 2 << 30
"""So that the guest has memory left when the balloon has its share."""
_REPORTED_SECONDS: Final = 120.0
_LOOK: Final = 0.5
_INIT_REPORTED, _INIT_ON_INFLATE = 6, 7


@dataclass(frozen=True, slots=True)
class Look:
    """One moment, from the host.

    Attributes:
        backed: bytes of guest memory that the host has backed.
        actual: bytes in the balloon, as the guest says.
        discarded: bytes that the device has given back so far.
        claimed: bytes of them that the driver was told to be zero (bits 6 and 7).
    """

    backed: int = 0
    actual: int = 0
    discarded: int = 0
    claimed: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase that has ended; `seconds` of wall time, and how things stood then."""

    name: str
    seconds: float
    end: Look
    note: str = ""


@dataclass(slots=True)
class Run:
    """What happened.

    Attributes:
        accel: ``kvm`` or ``tcg``.
        qemu: its version.
        kernel: the guest's release.
        offered: the feature bits that the guest sees in the device's registers.
        acked: those that its driver took.
        phases: in their order.
        statistics: what the guest said of itself in the end.
    """

    accel: str
    qemu: str
    kernel: str
    offered: list[int] = field(default_factory=list)
    acked: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """Return what ``--json`` prints; sizes in bytes."""
        return asdict(self)


class Watcher(Protocol):
    """Who is told what happens, while it does."""

    def begin(self, phase: str) -> None:
        """A phase begins."""

    def look(self, seconds: float, look: Look) -> None:
        """How things stand, `seconds` into the phase."""

    def end(self, phase: Phase) -> None:
        """The phase is over."""


class _Stage:
    """Runs the phases of one guest and looks on."""

    def __init__(self, guest: Guest, backend: Backend, run: Run, watcher: Watcher) -> None:
        self._guest = guest
        self._backend = backend
        self._run = run
        self._watcher = watcher
        self._began = self._looked = 0.0

    def look(self) -> Look:
        status = self._backend.status()
        queues = [queue for queue in status["metrics"]["device"].values() if isinstance(queue, dict)]
        return Look(
            self._guest.memory.backed(),
            status["device"]["actual_bytes"],
            sum(queue.get("discarded_bytes", 0) for queue in queues),
            sum(queue.get("claimed_zero_bytes", 0) for queue in queues),
        )

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._watcher.look(now - self._began, self.look())

    def phase(self, name: str, work: Callable[[], str | None]) -> None:
        self._watcher.begin(name)
        self._began = time.monotonic()
        note = work() or ""
        done = Phase(name, time.monotonic() - self._began, self.look(), note)
        self._run.phases.append(done)
        self._watcher.end(done)

    def rest(self) -> None:
        """Wait until the guest has reported what is free."""
        settle(self._guest, self._backend.cpu_seconds, look=self.tick)

    def in_guest(self, command: str, seconds: float = 300.0) -> None:
        """Run a command in the guest and look on."""
        self._guest.agent.start(command)

        def finished() -> bool:
            self.tick()
            try:
                answer = self._guest.agent.finish(_LOOK)
            except Unanswered:
                _ = self._guest.pid  # raises if QEMU has ended
                return False
            if answer.status:
                raise VmError(f"in the guest, {command!r} failed: {answer.output.strip()}")
            return True

        wait_for(finished, command, seconds)

    def resize(self, target: int) -> None:
        resize(self._backend, target, look=self.tick)


def run_demo(
    prepared: Prepared, accel: Accel, watcher: Watcher, *, memory: int = MEMORY, features: str | None = None
) -> Run:
    """Boot a guest with our device, dirty and free memory, resize the balloon, and say what happened.

    Args:
        prepared: QEMU and the guest.
        accel: KVM or software emulation.
        watcher: told of each phase.
        memory: the guest's, in bytes.
        features: those that the device offers, by name; default: its own default.

    Raises:
        VmError: something did not work; the text says what.
    """
    run = Run(accel.name, prepared.qemu.version, prepared.kernel_release)
    options = GuestOptions(accel=accel.name, memory=memory, append="quiet iomem=relaxed")
    watcher.begin("boot")
    began = time.monotonic()
    with guest_with_device(prepared, options, features) as (guest, backend):
        stage = _Stage(guest, backend, run, watcher)
        booted = Phase("boot", time.monotonic() - began, stage.look(), f"Linux {run.kernel}")
        run.phases.append(booted)
        watcher.end(booted)
        stage.phase("load the driver", lambda: _probe(guest, run))
        resting = booted.end.backed + SLACK
        stage.phase("report what is free", stage.rest)
        stage.phase(
            f"write {REPORT // MIB} MiB", lambda: stage.in_guest(write_command("/mnt/dirty", "dirty", REPORT))
        )

        def free() -> str:
            stage.in_guest("rm /mnt/dirty")
            wait_backed_below(guest, resting, _REPORTED_SECONDS, stage.tick)
            return "the guest reports what is free; the host takes it"

        stage.phase(f"free {REPORT // MIB} MiB", free)
        stage.phase(f"inflate to {INFLATE // MIB} MiB", lambda: _exact(stage, guest, INFLATE))
        stage.phase("deflate to 0", lambda: _exact(stage, guest, 0))
        dirty_and_free(guest, 16 * MIB)
        stage.phase("statistics", lambda: _statistics(backend, run))
    return run


def _probe(guest: Guest, run: Run) -> str:
    guest.load_driver()
    run.acked = sorted(guest.acked_features("hostzero"))
    run.offered = sorted(offered_features(guest, HOSTZERO_SLOT))
    zero = [bit for bit in (_INIT_REPORTED, _INIT_ON_INFLATE) if bit in run.offered]
    took = "takes" if set(zero) & set(run.acked) else "does not take"
    said = " and ".join(map(str, zero)) or "neither 6 nor 7"
    return f"the guest sees bits {said}; its driver {took} them" if zero else f"the guest sees {said}"


def _exact(stage: _Stage, guest: Guest, target: int) -> str:
    stage.resize(target)
    pages = target // PAGE_SIZE
    wait_balloon_pages(guest, pages)
    return f"actual is exact; the guest counts {pages} pages"


def _statistics(backend: Backend, run: Run) -> str:
    updates = backend.request("stats")["updates"]

    def fresh() -> bool:
        return bool(backend.status()["metrics"]["device"]["stats_updates"] > updates)

    wait_for(fresh, "the guest's statistics", 30.0)
    run.statistics = {name: int(value) for name, value in backend.status()["statistics"].items()}
    free, total = (run.statistics.get(name, 0) // MIB for name in ("memfree", "memtot"))
    return f"{free} of {total} MiB free, as the guest says"
