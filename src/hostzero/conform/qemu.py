# SPDX-License-Identifier: GPL-2.0-only
"""QEMU's own virtio-balloon-pci as a target, driven over qtest: no guest runs, the suite is the driver.

Each case gets a QEMU of its own, with guest memory in a file that this process has made and shares
with it through ``/proc``, so that content and host memory are checked from here. The transport is
the real one: PCI configuration space, BARs, MSI-X where the device has it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from hostzero.conform.in_process import HIGH_AT, HIGH_BYTES, LOW_BYTES
from hostzero.conform.pci_device import PciDevice
from hostzero.conform.pci_interrupts import IsrStatus
from hostzero.conform.qemu_process import QemuProcess, ask
from hostzero.conform.target import Ability
from hostzero.conform.virtio_pci import VirtioPciTransport
from hostzero.errors import DeviceError, TargetError, UsageError, VirtioError
from hostzero.ram import GuestMemory, MemoryRegion, open_ram
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.balloon import VIRTIO_ID_BALLOON, StatTag
from hostzero.virtio.features import QueueRole

DEVICE: Final = "virtio-balloon-pci"
SLOT: Final = 4
MESSAGES: Final = Gpa(1 << 20)
"""Guest RAM for MSI-X messages, below the arena."""

LOOK_EVERY: Final = 0.001
"""Seconds between two looks at memory, in which the device may write without a notification."""

NEVER: Final = 1 << 30
"""Seconds."""

UNSET: Final = (1 << 64) - 1
"""What QEMU has for a statistic that the driver did not send."""

_BALLOON: Final = "/machine/peripheral/balloon"
_INTERVAL: Final = "guest-stats-polling-interval"

STATISTICS: Final = {
    "stat-swap-in": StatTag.SWAP_IN,
    "stat-swap-out": StatTag.SWAP_OUT,
    "stat-major-faults": StatTag.MAJFLT,
    "stat-minor-faults": StatTag.MINFLT,
    "stat-free-memory": StatTag.MEMFREE,
    "stat-total-memory": StatTag.MEMTOT,
    "stat-available-memory": StatTag.AVAIL,
    "stat-disk-caches": StatTag.CACHES,
    "stat-htlb-pgalloc": StatTag.HTLB_PGALLOC,
    "stat-htlb-pgfail": StatTag.HTLB_PGFAIL,
    "stat-oom-kills": StatTag.OOM_KILL,
    "stat-alloc-stalls": StatTag.ALLOC_STALL,
    "stat-async-scans": StatTag.ASYNC_SCAN,
    "stat-direct-scans": StatTag.DIRECT_SCAN,
    "stat-async-reclaims": StatTag.ASYNC_RECLAIM,
    "stat-direct-reclaims": StatTag.DIRECT_RECLAIM,
}
"""QEMU's names for statistics (`balloon_stat_names`)."""


def command_line(memory: str, *, vectors: bool = True, more: Sequence[str] = ()) -> list[str]:
    """Return QEMU's arguments for a machine with a balloon and no guest.

    RAM lies as the suite has it everywhere: a part from 0 on and a part from 4 GiB on.

    Args:
        memory: the path of the file that is guest memory.
        vectors: whether the device has a property for its MSI-X vectors.
        more: the user's own arguments.
    """
    size = LOW_BYTES + HIGH_BYTES
    balloon = f"{DEVICE},id=balloon,addr={SLOT},disable-legacy=on,deflate-on-oom=on,free-page-reporting=on"
    balloon += ",free-page-hint=on,iothread=hints"
    # One for the configuration and one a queue; by itself QEMU has one for all queues.
    balloon += f",vectors={len(QueueRole) + 1}" if vectors else ""
    return [
        *("-machine", f"q35,memory-backend=ram,max-ram-below-4g={LOW_BYTES}"),
        *("-m", f"{size}B", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", f"memory-backend-file,id=ram,size={size},mem-path={memory},share=on"),
        *("-object", "iothread,id=hints", "-device", balloon),
        *more,
    ]


class QemuTarget:
    """The balloon of one QEMU binary.

    Attributes:
        name: ``qemu:`` and the path of the program.
    """

    def __init__(self, program: str, arguments: Sequence[str] = (), backing: str = "memfd") -> None:
        """Look at the program.

        Args:
            program: a path, or a name that is looked for in PATH.
            arguments: more arguments for QEMU, behind ours.
            backing: one of `hostzero.ram.BACKINGS` that is a file.

        Raises:
            UsageError: it does not run, or was built without the device.
        """
        found = shutil.which(program)
        if found is None:
            raise UsageError(f"--qemu {program}: there is no such program, or it may not be run")
        self.name = f"qemu:{program}"
        self._program = found
        self._arguments = tuple(arguments)
        self._backing = backing
        self._interrupts = ""
        version = ask(found, "--version").strip().splitlines()
        if not version or "QEMU" not in version[0]:
            raise UsageError(f"--qemu {program}: does not say which version of QEMU it is")
        self._version = version[0]
        if f'name "{DEVICE}"' not in ask(found, "-device", "help"):
            raise UsageError(f"--qemu {program}: this QEMU was built without {DEVICE}")
        self._vectors = " vectors=<" in ask(found, "-device", f"{DEVICE},help")

    def describe(self) -> Mapping[str, str]:
        """Return QEMU's version, and what carried its interrupts when a case last connected."""
        facts = {"device": f"{DEVICE} of {self._version}", "memory": self._backing}
        if self._interrupts:
            facts["interrupts"] = self._interrupts
        if self._arguments:
            facts["arguments"] = " ".join(self._arguments)
        return facts

    def connect(self) -> QemuConnection:
        """Return the device of a fresh QEMU.

        Raises:
            UsageError: QEMU does not start.
            TargetError: it has no balloon where it should, or ended at once.
        """
        connection = QemuConnection(self._program, self._arguments, self._backing, vectors=self._vectors)
        self._interrupts = connection.transport.interrupts.name
        return connection


class QemuConnection:
    """One QEMU process with one balloon, and its guest memory."""

    def __init__(self, program: str, arguments: Sequence[str], backing: str, *, vectors: bool) -> None:
        with ExitStack() as stack:
            ram = stack.enter_context(open_ram(LOW_BYTES + HIGH_BYTES, backing))
            self.memory = GuestMemory(
                [
                    MemoryRegion(Gpa(0), ram, 0, LOW_BYTES),
                    MemoryRegion(Gpa(HIGH_AT), ram, LOW_BYTES, HIGH_BYTES),
                ]
            )
            path = f"/proc/{os.getpid()}/fd/{ram.fileno}"
            words = command_line(path, vectors=vectors, more=arguments)
            self._process = stack.enter_context(QemuProcess(program, words))
            try:
                device = PciDevice(self._process.qtest, SLOT)
                self.transport = VirtioPciTransport(
                    device, VIRTIO_ID_BALLOON, self.memory, MESSAGES, len(QueueRole)
                )
            except (VirtioError, DeviceError) as error:
                raise UsageError(f"--qemu {program}: {error}") from error
            stack.callback(self.transport.close)
            self._exit = stack.pop_all()
        self.arena = range(LOW_BYTES // 2, LOW_BYTES)
        self.nowhere = Gpa(HIGH_AT // 2)
        self.missing: dict[Ability, str] = {
            Ability.HINT: "QEMU asks for free page hints only while it migrates a running guest"
        }
        if isinstance(self.transport.interrupts, IsrStatus):
            self.missing[Ability.INTERRUPTS] = "the device has one interrupt line for all queues (no MSI-X)"

    def settle(self, until: Callable[[], bool], timeout: float) -> bool:
        """Look at memory and at notifications until `until()` holds or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            self.transport.poll()
            if until():
                return True
            if time.monotonic() >= deadline:
                return False
            if self._process.ended:
                raise TargetError(self._process.why())
            time.sleep(LOOK_EVERY)

    def alive(self) -> bool:
        """Return whether QEMU lets a register of the device be read."""
        try:
            self.transport.status()
        except TargetError:
            return False
        return True

    def set_target(self, pages: int) -> None:
        """Ask for another balloon size over QMP, where it is the memory that is left."""
        self._process.qmp("balloon", value=LOW_BYTES + HIGH_BYTES - pages * PAGE_SIZE)

    def request_stats(self) -> None:
        """Have QEMU ask for statistics, once: a timer of its own that is new fires at once."""
        for seconds in (0, NEVER):
            self._process.qmp("qom-set", path=_BALLOON, property=_INTERVAL, value=seconds)

    def stats(self) -> Mapping[StatTag, int]:
        """Return the statistics that QEMU has."""
        read: Any = self._process.qmp("qom-get", path=_BALLOON, property="guest-stats")
        return {
            STATISTICS[name]: int(value)
            for name, value in read["stats"].items()
            if name in STATISTICS and int(value) & UNSET != UNSET
        }

    def hint_start(self) -> None:
        """Do nothing: the cases look at `missing` first."""
        raise NotImplementedError(self.missing[Ability.HINT])

    hint_stop = hint_done = hint_start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
