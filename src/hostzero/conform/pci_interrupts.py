# SPDX-License-Identifier: GPL-2.0-only
"""How a device without a processor to interrupt tells that something happened.

With MSI-X an interrupt is a write of 32 bits to memory, so each vector gets a word of guest RAM,
and whether it was written is seen by looking; several between two looks are seen as one. Without
it there is one line for everything: the ISR status tells a configuration change from the rest
(virtio 1.3, 4.1.4.5), but which queue was meant nobody can say, so nothing is said about queues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from hostzero.conform.pci_device import PciDevice
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.pci import ISR_CONFIG, NO_VECTOR

_MESSAGE: Final = 0x5A5A_5A5A
_WORD: Final = 4


class Messages:
    """MSI-X: a word of guest RAM for each vector."""

    name = "MSI-X"

    def __init__(self, device: PciDevice, memory: GuestMemory, at: Gpa, events: int) -> None:
        """Use the words from guest address `at` on, which nobody else may use."""
        self._words = memory.view(at, events * _WORD).cast("I")
        device.enable_msix([int(at) + _WORD * event for event in range(events)], _MESSAGE)

    def vector(self, event: int) -> int:
        """Return the vector of an event, 0 for the configuration and n + 1 for queue n: its own number."""
        return event

    def take(self) -> Iterator[int]:
        """Yield the events whose words were written."""
        for event, word in enumerate(self._words):
            if word:
                # Cleared before the handler runs: a message that comes meanwhile is a new one.
                self._words[event] = 0
                yield event

    def close(self) -> None:
        """Let go of guest memory, so that it can be unmapped."""
        self._words.release()


class IsrStatus:
    """INTx: one line, and a register that says why and is cleared by reading."""

    name = "INTx"

    def __init__(self, read: Callable[[], int]) -> None:
        """Know how to read the ISR status."""
        self._read = read

    def vector(self, event: int) -> int:
        """Return `NO_VECTOR`."""
        return NO_VECTOR

    def take(self) -> Iterator[int]:
        """Yield 0 if the configuration has changed."""
        if self._read() & ISR_CONFIG:
            yield 0

    def close(self) -> None:
        """Do nothing: it holds nothing."""
