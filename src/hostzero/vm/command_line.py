# SPDX-License-Identifier: GPL-2.0-only
"""The command line of a QEMU with one guest and its balloons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostzero.units import format_size
from hostzero.vm.prepared import Prepared

MEMORY: Final = 3 << 30
QUEUES: Final = 5
"""Inflate, deflate, statistics, hinting, reporting."""
QUEUE_SIZE: Final = 128
CONFIG_SIZE: Final = 16
VIRTIO_ID_BALLOON: Final = 5

HOSTZERO_SLOT: Final = 5
QEMU_SLOT: Final = 6

_ACCEL: Final = {"kvm": ("kvm", "host"), "tcg": ("tcg,thread=multi", "max")}


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What a guest is started with.

    Attributes:
        accel: ``kvm`` or ``tcg``.
        memory: bytes.
        append: more for the kernel's command line.
        hostzero: whether it has hostzero's device, on a vhost-user socket.
        qemu: whether it has QEMU's own balloon.
        huge_pages: whether its memory is of 2 MiB huge pages (hugetlb).
        reporting: whether QEMU's own balloon offers free page reporting.
    """

    accel: str = "tcg"
    memory: int = MEMORY
    append: str = ""
    hostzero: bool = True
    qemu: bool = False
    huge_pages: bool = False
    reporting: bool = True


def balloon_arguments(socket: Path) -> list[str]:
    """Return what gives a QEMU the balloon that a vhost-user back end serves at `socket`."""
    device = f"vhost-user-test-device-pci,id=hostzero,chardev=hostzero-socket,addr={HOSTZERO_SLOT}"
    shape = f"virtio-id={VIRTIO_ID_BALLOON},num_vqs={QUEUES},vq_size={QUEUE_SIZE},config_size={CONFIG_SIZE}"
    return ["-chardev", f"socket,id=hostzero-socket,path={socket}", "-device", f"{device},{shape}"]


def command_line(prepared: Prepared, options: GuestOptions, folder: Path) -> list[str]:
    """Return the arguments after QEMU's own name.

    Args:
        prepared: kernel and root file system.
        options: the guest.
        folder: where the sockets lie: ``agent`` and ``qmp`` listen when QEMU starts, as does
            ``balloon`` if the guest has hostzero's device. ``console.log`` is written there.
    """
    accel, cpu = _ACCEL[options.accel]
    memory = f"memory-backend-memfd,id=ram,size={format_size(options.memory)},share=on"
    if options.huge_pages:
        memory += ",hugetlb=on,hugetlbsize=2M"
    append = f"console=ttyS0 panic=-1 {options.append}".strip()
    arguments = ["-accel", accel, "-machine", "q35,memory-backend=ram", "-cpu", cpu, "-smp", "1"]
    arguments += ["-m", format_size(options.memory), "-object", memory]
    arguments += ["-nodefaults", "-display", "none", "-no-reboot", "-run-with", "exit-with-parent=on"]
    arguments += ["-kernel", str(prepared.kernel), "-initrd", str(prepared.initramfs), "-append", append]
    arguments += ["-chardev", f"file,id=console,path={folder / 'console.log'}", "-serial", "chardev:console"]
    arguments += ["-chardev", f"socket,id=agent,path={folder / 'agent'}", "-serial", "chardev:agent"]
    arguments += ["-qmp", f"unix:{folder / 'qmp'}"]
    if options.hostzero:
        arguments += balloon_arguments(folder / "balloon")
    if options.qemu:
        reporting = "on" if options.reporting else "off"
        device = f"virtio-balloon-pci,id=qemu,free-page-reporting={reporting},deflate-on-oom=on"
        arguments += ["-device", f"{device},addr={QEMU_SLOT}"]
    return arguments
