# SPDX-License-Identifier: GPL-2.0-only
"""Every error that hostzero raises, in one tree.

::

    HostzeroError
    ├── UsageError                what the user asked for does not fit (exit status 2)
    ├── RamError                  ram/: guest memory on the host
    │   ├── RangeError            a range is empty, unaligned or outside the region
    │   └── BackingUnavailable    this machine does not have that backing, or not enough of it
    ├── MmError                   mm/: the guest's memory manager
    │   ├── OutOfMemory           no free page after every reserve and notifier
    │   │   └── MemcgOutOfMemory  a memory cgroup is at its limit
    │   ├── BadAddress            a process touched an address that it has not mapped
    │   └── VmBug                 a debug assertion of the kernel failed (VM_BUG_ON)
    ├── VirtioError               virtio/: the wire
    │   ├── RingError             a ring breaks a rule of virtio 1.3, 2.7
    │   └── NegotiationError      the two ends cannot agree on features or queues
    ├── DeviceError               device/: a request that the device refuses
    ├── DriverError               driver/: a device that the driver refuses
    ├── ControlError              vhost_user/: the control socket of a device gives no answer, or an error
    ├── VhostUserError            vhost_user/: the socket and what comes over it
    │   ├── MessageError          a message that is refused; the connection goes on
    │   └── ConnectionLost        the connection cannot go on, or the peer has closed it
    ├── TargetError               conform/: a device under test that went away or no longer answers
    └── VmError                   vm/: a real virtual machine, or preparing one, failed

A command ends with status 2 for `UsageError` and `BackingUnavailable`, which the
user can mend, and with status 1 for everything else in the tree.
"""

from __future__ import annotations


class HostzeroError(Exception):
    """The root: something that hostzero itself found wrong."""


class UsageError(HostzeroError):
    """What the user asked for does not fit; the text names the option and the mend."""


class RamError(HostzeroError):
    """Guest memory on the host cannot do what was asked."""


class RangeError(RamError):
    """A range is empty, unaligned, overflowing or outside the region; nothing was touched."""


class BackingUnavailable(RamError):
    """This machine lacks the backing; the text says what would provide it."""


class MmError(HostzeroError):
    """The guest's memory manager refused a request."""


class OutOfMemory(MmError):
    """No free page is left after the reserves, the drains and the OOM notifiers."""


class MemcgOutOfMemory(OutOfMemory):
    """A memory cgroup is at its limit; the guest as a whole may have memory left."""


class BadAddress(MmError):
    """A process touched an address that no mapping covers (SIGSEGV in a real guest)."""


class VmBug(MmError):
    """A debug assertion of the kernel failed (VM_BUG_ON, VM_WARN_ON_ONCE)."""


class VirtioError(HostzeroError):
    """The wire between driver and device is not as virtio 1.3 says."""


class RingError(VirtioError):
    """A ring breaks a rule of virtio 1.3, 2.7; the text names the rule."""


class NegotiationError(VirtioError):
    """The two ends cannot agree on features or queues."""


class DeviceError(HostzeroError):
    """The device refuses a request; that request is lost and nothing else."""


class DriverError(HostzeroError):
    """The driver refuses a device (probe fails)."""


class ControlError(HostzeroError):
    """A running device gives no answer on its control socket, or answers by an error."""


class VhostUserError(HostzeroError):
    """Something on a vhost-user socket is not as the protocol says."""


class MessageError(VhostUserError):
    """A message that is refused: nothing of it was done, and the connection goes on.

    Attributes:
        kind: what is wrong with it, in one word to count by (`hostzero.vhost_user.metrics`).
    """

    def __init__(self, kind: str, text: str) -> None:
        """Say what is wrong in a word and in a sentence."""
        super().__init__(text)
        self.kind = kind


class ConnectionLost(VhostUserError):
    """The peer has closed the connection, or broken its framing so that it cannot go on."""


class TargetError(HostzeroError):
    """A device under test went away, or no longer answers; the case that saw it fails."""


class VmError(HostzeroError):
    """Preparing, starting or talking to a real virtual machine failed; the text says at what."""
