# SPDX-License-Identifier: GPL-2.0-only
"""One guest of the benchmark, from boot to the moment before a phase begins.

Every repetition boots a fresh guest on emptied host memory, so that no arm inherits another's
free lists or page sizes. The guest first writes all of its memory but a sixteenth: every
arm begins with memory that is resident, dirty and free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from hostzero.bench.arms import features, gives_memory_away
from hostzero.bench.names import HUGETLB_SCENARIOS, Arm, Scenario
from hostzero.bench.options import BALLOON_MARGIN, RESERVE_SHARE
from hostzero.errors import OutOfMemory
from hostzero.machine import Machine
from hostzero.mm import MmConfig
from hostzero.mm.mmap import (
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_UNINITIALIZED,
)
from hostzero.units import PMD_SIZE

if TYPE_CHECKING:
    from types import TracebackType

    from hostzero.ram import Ram

DIRT: Final = 0xAA
"""What the guest's memory holds before it is freed: a page that is not zeroed shows."""


class PreparedGuest:
    """A guest whose free memory is as its arm wants it.

    Attributes:
        machine: the machine.
        returned: bytes that went back to the host, by the host's own account of residency.
    """

    def __init__(self, ram: Ram, scenario: Scenario, arm: Arm, size: int) -> None:
        """Boot on `ram`, dirty the free memory, and give it away if the arm does.

        Args:
            ram: host memory of the guest.
            scenario: the page size of the measured process, and the way memory is given away.
            arm: what is negotiated.
            size: what a phase is going to populate, in bytes.
        """
        ram.discard(0, ram.size)
        self.scenario, self.arm, self._size = scenario, arm, size
        # The kernel's debug assertions cost what no production kernel pays: off, in every arm.
        self.machine = Machine(ram=ram, features=features(scenario, arm), mm=MmConfig(debug_vm=False))
        self._dirty(ram.size - ram.size // RESERVE_SHARE)
        if scenario in HUGETLB_SCENARIOS:
            self.machine.mm.hugetlb.set_nr_overcommit(size // PMD_SIZE)
        self._process = self.machine.spawn()
        before = ram.resident()
        self.give_away()
        self.returned = max(before - ram.resident(), 0)

    def __enter__(self) -> Self:
        """Return the guest itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Switch the guest off; its memory stays with the host region."""
        self.machine.close()

    def give_away(self) -> None:
        """Give free memory to the host, in the scenario's way and if the arm does at all."""
        if not gives_memory_away(self.arm):
            return
        if self.scenario is Scenario.BALLOON:
            wanted = self._size + BALLOON_MARGIN
            got = self.machine.balloon(wanted)
            if got < wanted:
                raise OutOfMemory(f"the balloon holds {got >> 20} MiB of {wanted >> 20}: give the guest more")
            self.machine.balloon(0)
        else:
            self.machine.flush()

    def map(self) -> int:
        """Map what a phase populates; return its address."""
        flags = MAP_UNINITIALIZED if self.arm is Arm.NO_ZEROING else 0
        if self.scenario in HUGETLB_SCENARIOS:
            flags |= MAP_HUGETLB
        if self.scenario is Scenario.HUGETLB:
            # A reservation allocates the pages at mmap, and in v8 without zeros.
            flags |= MAP_NORESERVE
        address = self._process.mmap(self._size, flags)
        if self.scenario is Scenario.SMALL_PAGES:
            self._process.madvise(address, self._size, MADV_NOHUGEPAGE)
        return address

    def populate(self, address: int) -> None:
        """Allocate the mapping's pages without touching them, as the cover letter's program does."""
        self._process.madvise(address, self._size, MADV_POPULATE_WRITE)

    def touch(self, address: int) -> None:
        """Write one byte to each page of the mapping."""
        self._process.touch(address, self._size)

    def fill(self, address: int) -> None:
        """Write every byte of the mapping."""
        self._process.fill(address, self._size, DIRT)

    def unmap(self, address: int) -> None:
        """Free the mapping."""
        self._process.munmap(address, self._size)

    def first_nonzero(self, address: int) -> int | None:
        """Return the first address of the mapping that does not read as zero, or None."""
        return self._process.find_nonzero(address, self._size)

    def _dirty(self, size: int) -> None:
        size = size // PMD_SIZE * PMD_SIZE
        with self.machine.spawn() as process:
            process.fill(process.mmap(size), size, DIRT)
