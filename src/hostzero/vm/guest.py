# SPDX-License-Identifier: GPL-2.0-only
"""One running virtual machine: QEMU as a process, its monitor, and the shell in the guest.

::

    new ──start──> booting ──agent says ready──> running ──stop, or QEMU ends──> ended

Everything that the machine needs lies in a folder of its own, which is gone afterwards. QEMU
connects to sockets that listen here already, so nothing has to be tried twice. If this process
dies, QEMU ends too (``exit-with-parent``).
"""

from __future__ import annotations

import enum
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from qemu.qmp.error import QMPError

from hostzero.errors import VmError
from hostzero.qmp import Monitor
from hostzero.vm.agent import Agent, Unanswered
from hostzero.vm.command_line import HOSTZERO_SLOT, QEMU_SLOT, GuestOptions, command_line
from hostzero.vm.host_memory import HostMemory
from hostzero.vm.initramfs import MODULE
from hostzero.vm.prepared import Prepared
from hostzero.vm.wait import wait_for

CONNECT_SECONDS: Final = 30.0
BOOT_SECONDS: Final = 120.0
STOP_SECONDS: Final = 20.0
QMP_SECONDS: Final = 30.0

_DRIVER: Final = "/sys/bus/virtio/drivers/virtio_balloon"
_SLOTS: Final = {"hostzero": HOSTZERO_SLOT, "qemu": QEMU_SLOT}


class State(enum.Enum):
    """Where a machine is in its life."""

    NEW = enum.auto()
    BOOTING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Guest:
    """A virtual machine, from `start` to `stop`.

    Attributes:
        options: what it was started with.
        folder: its sockets, and ``console.log`` and ``qemu.log``.
        agent: the shell in the guest, once it runs.
    """

    def __init__(self, prepared: Prepared, options: GuestOptions) -> None:
        """Make a machine that is not started; `close` it in the end."""
        self._prepared = prepared
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="hostzero-vm-"))
        self._state = State.NEW
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Monitor | None = None
        self._agent: Agent | None = None
        self._memory: HostMemory | None = None

    @property
    def state(self) -> State:
        """Where it is in its life; notices if QEMU has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            self._state = State.ENDED
        return self._state

    @property
    def balloon_socket(self) -> Path:
        """Where a vhost-user back end must listen before `start`."""
        return self.folder / "balloon"

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._running().pid

    @property
    def agent(self) -> Agent:
        """The shell in the guest."""
        if self._agent is None:
            raise VmError("the guest is not running")
        return self._agent

    @property
    def memory(self) -> HostMemory:
        """The guest's memory as the host has it."""
        if self._memory is None:
            self._memory = HostMemory.of(self.pid)
        return self._memory

    def start(self, seconds: float = BOOT_SECONDS) -> None:
        """Start QEMU and wait until the guest answers.

        Raises:
            VmError: QEMU does not start, or the guest does not boot in time; the text has what they said.
        """
        if self._state is not State.NEW:
            raise VmError("a machine starts once")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener, (self.folder / "qemu.log").open("wb") as log:
            listener.bind(str(self.folder / "agent"))
            listener.listen(1)
            listener.settimeout(CONNECT_SECONDS)
            self._qmp = Monitor(self.folder / "qmp")
            self._process = self._spawn(log)
            self._state = State.BOOTING
            try:
                listener.settimeout(0.0)
                connected = wait_for(lambda: self._accept(listener), "QEMU starts", CONNECT_SECONDS)
                connected.setblocking(True)
                self._agent = Agent(connected)
                self._qmp.accept(timeout=QMP_SECONDS)
                self._qmp.settimeout(QMP_SECONDS)
                self._boot(seconds)
            except (OSError, VmError, QMPError) as error:
                raise VmError(f"the guest did not start: {error}{self.last_words()}") from error
        self._state = State.RUNNING

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        qemu = self._prepared.qemu
        return subprocess.Popen(
            [*qemu.argv, *command_line(self._prepared, self.options, self.folder)],
            env={**os.environ, **qemu.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal is for hostzero, which then stops QEMU.
            start_new_session=True,
        )

    def _accept(self, listener: socket.socket) -> socket.socket | None:
        if self._process is not None and self._process.poll() is not None:
            raise VmError("QEMU ended at once")
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None

    def _boot(self, seconds: float) -> None:
        # In short turns: a virtual CPU that KVM cannot run stops, and the guest stays silent for ever.
        turns = max(1, round(seconds))
        for turn in range(turns):
            try:
                self.agent.wait_ready(seconds / turns)
            except Unanswered:
                if turn == turns - 1 or self.state is State.ENDED:
                    raise
                status = self.qmp("query-status")["status"]
                if status != "running":
                    raise VmError(f"the virtual CPU stopped ({status})") from None
            else:
                return

    def last_words(self) -> str:
        """Return what QEMU and the guest's kernel said last, for an error; begins with a separator."""
        words = ""
        for name in ("qemu.log", "console.log"):
            try:
                lines = (self.folder / name).read_text(errors="replace").strip().splitlines()
            except OSError:
                continue
            if lines:
                # QEMU's first line says what is wrong, a kernel's last ones do.
                said = lines[:1] if name == "qemu.log" else lines[-2:]
                words += f"; {name}: " + " / ".join(line.strip() for line in said)
        return words

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor and return what it returns.

        Raises:
            VmError: QEMU refuses, or has ended.
        """
        if self._qmp is None:
            raise VmError("QEMU is not running")
        try:
            return self._qmp.cmd(command, **arguments)
        except (OSError, QMPError) as error:
            raise VmError(f"QEMU's monitor, {command}: {error}") from error

    def load_driver(self) -> None:
        """Load the balloon driver; it takes every balloon that the guest has and that it can serve."""
        self.agent.run(f"insmod /{MODULE}")

    def unload_driver(self, seconds: float = 120.0) -> None:
        """Unload the balloon driver; the guest gets back all its memory."""
        self.agent.run(f"rmmod {MODULE.removesuffix('.ko')}", seconds)

    def virtio_name(self, balloon: str) -> str:
        """Return the name of the ``hostzero`` or the ``qemu`` balloon on the guest's virtio bus."""
        slot = f"/sys/bus/pci/devices/0000:00:{_SLOTS[balloon]:02x}.0"
        return self.agent.read(f"cd {slot} && echo virtio*").strip()

    def bind(self, balloon: str) -> None:
        """Have the driver take a balloon."""
        self.agent.run(f"echo {self.virtio_name(balloon)} > {_DRIVER}/bind")

    def unbind(self, balloon: str) -> None:
        """Have the driver give a balloon up; the guest gets back its memory."""
        self.agent.run(f"echo {self.virtio_name(balloon)} > {_DRIVER}/unbind")

    def acked_features(self, balloon: str) -> set[int]:
        """Return the feature bits that the driver took."""
        text = self.agent.read(f"cat /sys/bus/virtio/devices/{self.virtio_name(balloon)}/features").strip()
        return {bit for bit, digit in enumerate(text) if digit == "1"}

    def balloon_pages(self) -> int:
        """Return how many pages the guest counts inside balloons; one that is being moved counts twice."""
        return self.vmstat("nr_balloon_pages")

    def vmstat(self, name: str) -> int:
        """Return one counter of the guest's ``/proc/vmstat``."""
        return int(self.agent.read(f"grep '^{name} ' /proc/vmstat").split()[1])

    def stop(self) -> None:
        """End QEMU; a guest that runs is not asked."""
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._state = State.ENDED

    def close(self) -> None:
        """End QEMU and remove the folder."""
        self.stop()
        if self._agent is not None:
            self._agent.close()
        if self._memory is not None:
            self._memory.close()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self.state is State.ENDED:
            code = None if self._process is None else self._process.returncode
            why = f" (signal {signal.Signals(-code).name})" if code is not None and code < 0 else ""
            raise VmError(f"QEMU is not running{why}{self.last_words()}")
        return self._process
