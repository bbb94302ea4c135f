# SPDX-License-Identifier: GPL-2.0-only
"""The feature bits that a device offers, as the guest reads them from the device's registers.

sysfs shows only the features that a driver took. The offer stands in ``device_feature`` of the
common configuration (virtio 1.3, 4.1.4.3), 32 bits at a time, chosen by writing
``device_feature_select``. The guest reads it through /dev/mem, which needs ``iomem=relaxed``
on its kernel's command line, because a driver has claimed the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hostzero.errors import VmError
from hostzero.virtio.pci import Common, Group, register_groups
from hostzero.vm.guest import Guest

FEATURE_WORDS: Final = 2


def parse_bytes(dump: str) -> bytes:
    """Return the bytes of ``od -An -v -tx1`` output."""
    return bytes.fromhex("".join(dump.split()))


def common_configuration(config: bytes) -> tuple[int, int]:
    """Return BAR number and offset of the common configuration, from a PCI configuration space.

    Raises:
        VmError: there is none.
    """
    try:
        registers = register_groups(config)[Group.COMMON]
    except KeyError:
        raise VmError("the device has no common configuration: it is no modern virtio device") from None
    return registers.bar, registers.offset


def bar_address(resources: str, bar: int) -> int:
    """Return where a BAR lies, from what sysfs has in ``resource``.

    Raises:
        VmError: the BAR is not there.
    """
    lines = resources.strip().splitlines()
    start = int(lines[bar].split()[0], 16) if bar < len(lines) else 0
    if start == 0:
        raise VmError(f"BAR {bar} has no address")
    return start


def offered_features(guest: Guest, slot: int) -> set[int]:
    """Return the feature bits that the device in a PCI slot offers.

    Raises:
        VmError: the guest cannot read the registers (was it booted with ``iomem=relaxed``?).
    """
    folder = f"/sys/bus/pci/devices/0000:00:{slot:02x}.0"
    config = parse_bytes(guest.agent.read(f"od -An -v -tx1 {folder}/config"))
    bar, offset = common_configuration(config)
    base = bar_address(guest.agent.read(f"cat {folder}/resource"), bar) + offset

    def word(number: int) -> int:
        select, value = base + Common.DEVICE_FEATURE_SELECT, base + Common.DEVICE_FEATURE
        command = f"devmem {select:#x} 32 {number} && devmem {value:#x} 32"
        return int(guest.agent.read(command).strip(), 16)

    return bits(word)


def bits(word: Callable[[int], int]) -> set[int]:
    """Return the numbers of the bits that are set; `word` returns 32 of them at a time."""
    found = set()
    for number in range(FEATURE_WORDS):
        value = word(number)
        found |= {32 * number + bit for bit in range(32) if value >> bit & 1}
    return found
