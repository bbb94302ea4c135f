# SPDX-License-Identifier: GPL-2.0-only
"""What a guest's device costs the host: which thread's CPU time counts as the device's.

===============  ==========================================================================
QEMU main        the main thread, where QEMU's devices are; for hostzero's device it passes
                 notifications on
back end         `hostzero device`, all of it; QEMU's own device has none
**device**       both together
vCPU             the guest, and what QEMU does on its behalf while it waits: reading and writing
                 configuration space, which for a vhost-user device is a message and its answer
everything       both processes, whatever thread
===============  ==========================================================================

The vCPU's thread does guest work above all, and under software emulation translates it too, so
it is not counted to the device. What a device costs there shows in *everything*.
"""

from __future__ import annotations

from typing import NamedTuple

from hostzero.vm.cpu import process_seconds, thread_seconds, thread_waited, threads


class Usage(NamedTuple):
    """CPU seconds since the start of the processes, or between two readings.

    Attributes:
        main: of QEMU's main thread.
        backend: of the back end.
        vcpu: of the threads of virtual CPUs.
        everything: of both processes.
        waited: seconds that these threads were ready to run and did not, all together.
    """

    main: float
    backend: float
    vcpu: float
    everything: float
    waited: float

    @property
    def device(self) -> float:
        """What counts as the device's."""
        return self.main + self.backend

    def since(self, earlier: Usage) -> Usage:
        """Return what was used between an earlier reading and this one."""
        return Usage(*(now - then for now, then in zip(self, earlier, strict=True)))


class Meter:
    """Reads what one guest's processes have used; costs them nothing."""

    def __init__(self, qemu: int, vcpus: list[int], backend: int | None) -> None:
        """Watch these processes.

        Args:
            qemu: QEMU's process id.
            vcpus: the threads of its virtual CPUs, as QMP's ``query-cpus-fast`` says.
            backend: the back end's process id, if there is one.
        """
        self._qemu = qemu
        self._vcpus = vcpus
        self._backend = backend

    def read(self) -> Usage:
        """Return what has been used so far.

        Raises:
            VmError: a process has ended.
        """
        qemu, backend = self._qemu, self._backend
        backend_seconds = 0.0 if backend is None else process_seconds(backend)
        waited = sum(thread_waited(qemu, thread) for thread in (qemu, *self._vcpus))
        if backend is not None:
            waited += sum(thread_waited(backend, thread) for thread in threads(backend))
        return Usage(
            main=thread_seconds(qemu, qemu),
            backend=backend_seconds,
            vcpu=sum(thread_seconds(qemu, thread) for thread in self._vcpus),
            everything=process_seconds(qemu) + backend_seconds,
            waited=waited,
        )
