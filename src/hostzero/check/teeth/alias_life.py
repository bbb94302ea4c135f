# SPDX-License-Identifier: GPL-2.0-only
"""One guest's life, to see which states of the alias of `PG_private` reach somebody.

The cover letter asks whether `PG_zeroed` may be `PG_private` or should be a bit of its own. The
searches stop at the first state that must not be. This does not stop there: the guest goes on,
as a production kernel does, and what is noted is what somebody gets to see: bytes that should be
zero, a `PG_private` that nobody set, a page lost to the page checks.

Owners use `PG_private` and `PG_uptodate` for their own purposes, as file systems do. Where pages
are checked they take them off before they free a page; where they are not, some forget to, and
prepare has to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hostzero.errors import HostzeroError, MmError, OutOfMemory, VmBug
from hostzero.mm import MemoryManager, MmConfig
from hostzero.mm.contig import alloc_contig_frozen_pages, free_contig_frozen_range
from hostzero.mm.gfp import GFP_COMP, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_ZERO
from hostzero.mm.mmap import Process
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PG_private, PG_uptodate, PG_zeroed
from hostzero.mm.page_reporting import PageReportingDevInfo
from hostzero.ram import open_ram
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Pfn

if TYPE_CHECKING:
    from numpy.typing import NDArray

KERNELS: Final[dict[str, dict[str, bool]]] = {
    "plain": {"debug_vm": False},
    "failing": {"debug_vm": False},
    "hardened": {"debug_vm": False, "init_on_alloc": True},
    "debug": {"debug_vm": True},
}
"""Kernels by what they check: nothing; nothing until memory breaks, and then every page that is
allocated (as here, not as in Linux); every page that comes and goes; and their own assertions too."""

EVENTS: Final = {
    "wrong bytes": "a page that was asked for as zero holds something else",
    "foreign flag": "an owner finds PG_private set on a page that it has just got",
    "stale mark": "a page in use carries the zero mark, where that is a bit of its own",
    "bad page": "the page checks take a page out of use",
    "assertion": "an assertion of a debug kernel fails",
    "breakdown": "the guest is so wrong that it cannot go on",
}
"""What is noted, the first time that it happens."""

MIB: Final = 8
_SMALL_ORDERS: Final = (0, 0, 0, 0, 1, 2, 3, 4, 5, 9)
_MOST: Final = 0.6  # of the pages are owned; above that, nobody allocates
_MAPPED: Final = 128  # pages of the process


@dataclass
class Life:
    """A guest, who owns what in it, and what has been noted.

    Attributes:
        seed: what everything is drawn from.
        kernel: one of `KERNELS`.
        first: by event, the step at which it happened first.
    """

    seed: int
    kernel: str
    first: dict[str, int] = field(default_factory=dict)
    step: int = 0

    def run(self, steps: int) -> None:
        """Live so many steps, or until an assertion ends the guest."""
        self._random = random.Random(self.seed)
        with open_ram(MIB << 20) as ram:
            # What an earlier owner left, so that zeros mean something.
            ram.array(np.dtype(np.uint8))[:] = 0x5A
            self._mm = MemoryManager(ram, MmConfig(nr_cpus=2, thp="never", **KERNELS[self.kernel]))  # type: ignore[arg-type]
            self._owned: list[tuple[int, int]] = []
            self._broken: list[int] = []
            self._devices = [PageReportingDevInfo(self._report, 4, 2, host_zeroes_pages=True)]
            self._mm.page_reporting.register(self._devices[0])
            self._mm.balloon.register_migratepage(lambda new, _: self._discard(int(new), 0))
            self._process: Process = self._mm.spawn()
            self._mapped: list[tuple[int, int]] = []
            try:
                for self.step in range(1, steps + 1):
                    self._one()
                    if int(self._mm.mem.vm[0].nr_bad_pages):
                        self._note("bad page")
            except VmBug:
                self._note("assertion")
            except (HostzeroError, ArithmeticError, LookupError, ValueError):
                # Page tables of bytes that should have been zero lead anywhere.
                self._note("breakdown")

    def _one(self) -> None:
        names: tuple[Callable[[], None], ...] = (
            self._allocate,
            self._free,
            self._inflate,
            self._deflate,
            self._flush,
            self._map,
            self._unmap,
            self._compact,
            self._drain,
            self._break,
            self._hibernate,
            self._range,
        )
        breaks = int(self.kernel in {"failing", "debug"})
        (action,) = self._random.choices(names, (34, 34, 4, 4, 6, 5, 5, 2, 3, breaks, 1, 1))
        with contextlib.suppress(OutOfMemory):
            action()

    def _note(self, event: str) -> None:
        self.first.setdefault(event, self.step)

    # ---- owners

    def _allocate(self) -> None:
        owned = sum(1 << order for _, order in self._owned)
        if owned > _MOST * self._mm.nr_pages:
            return
        order = self._random.choice(_SMALL_ORDERS)
        gfp = GFP_HIGHUSER_MOVABLE if self._random.random() < 0.5 else GFP_KERNEL
        if self._random.random() < 0.6:
            gfp |= GFP_ZERO
        if order and self._random.random() < 0.5:
            gfp |= GFP_COMP
        pfn = int(self._mm.alloc_pages(gfp, order, cpu=self._random.randrange(2)))
        self._got(pfn, order, bool(gfp & GFP_ZERO) or self._mm.config.init_on_alloc)
        if self._random.random() < 0.8:
            self._bytes(pfn, order)[:] = self._random.randrange(1, 256)
        if self._random.random() < 0.3:
            pages = range(pfn, pfn + (1 << order))
            page = self._mm.mem.mem_map[self._random.choice(pages)]
            page.flags_f |= PG_private | PG_uptodate
        self._owned.append((pfn, order))

    def _got(self, pfn: int, order: int, zero: bool) -> None:
        flags = self._mm.mem.mem_map["flags_f"][pfn : pfn + (1 << order)]
        if (flags & PG_private).any():
            self._note("foreign flag")
        elif (flags & PG_zeroed).any():
            self._note("stale mark")
        if zero and self._bytes(pfn, order).any():
            self._note("wrong bytes")

    def _free(self) -> None:
        if not self._owned:
            return
        pfn, order = self._owned.pop(self._random.randrange(len(self._owned)))
        flags = self._mm.mem.mem_map["flags_f"]
        if self.kernel not in {"plain", "failing"} or self._random.random() < 0.7:
            flags[pfn : pfn + (1 << order)] &= ~(PG_private | PG_uptodate)
        cpu = self._random.randrange(2)
        if self._random.random() < 0.1:
            with self._mm.zone_lock(int(self._mm.mem.mem_map[pfn].zone)):
                self._mm.free_pages_nolock(Pfn(pfn), order, cpu=cpu)
        else:
            self._mm.free_pages(Pfn(pfn), order, cpu=cpu)

    # ---- the balloon and the host

    def _inflate(self) -> None:
        pfns = self._mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, self._random.randrange(1, 17))
        for pfn in pfns:
            self._got(int(pfn), 0, False)
        self._mm.balloon.enqueue(pfns)
        zeroed = np.array([self._discard(int(pfn), 0) for pfn in pfns], dtype=np.bool_)
        self._mm.balloon.set_zeroed(pfns, zeroed)

    def _deflate(self) -> None:
        self._mm.balloon.release(self._mm.balloon.dequeue(self._random.randrange(1, 17)))

    def _flush(self) -> None:
        self._mm.page_reporting.flush(self._random.randrange(1, 16))

    def _report(self, entries: Sequence[tuple[Pfn, int]]) -> None:
        for i, (pfn, order) in enumerate(entries):
            self._devices[0].zeroed_bitmap[i] = self._discard(int(pfn), order)
        if self._random.random() < 0.1:
            raise HostzeroError("the device failed")

    def _discard(self, pfn: int, order: int) -> bool:
        """Do as a host that drops memory most of the time; return whether it did."""
        if self._random.random() < 0.3:
            return False
        self._bytes(pfn, order)[:] = 0
        return True

    # ---- processes, and the rest of the guest

    def _map(self) -> None:
        length = self._random.randrange(1, 17) << PAGE_SHIFT
        if sum(size for _, size in self._mapped) + length > _MAPPED << PAGE_SHIFT:
            return
        addr = self._process.mmap(length)
        self._mapped.append((addr, length))
        self._process.touch(addr, length)
        # Touching writes a byte a page; what else there is comes from an earlier owner.
        for page in range(addr, addr + length, PAGE_SIZE):
            if any(self._process.read(page, PAGE_SIZE)[8:]):
                self._note("wrong bytes")
        self._process.fill(addr, length, self._random.randrange(1, 256))

    def _unmap(self) -> None:
        if self._mapped:
            self._process.munmap(*self._mapped.pop(self._random.randrange(len(self._mapped))))

    def _compact(self) -> None:
        self._mm.compact_memory()

    def _drain(self) -> None:
        self._mm.drain_all_pages()

    def _break(self) -> None:
        if self._broken:
            self._mm.memory_failure.unpoison_memory(self._broken.pop())
            return
        pfn = self._random.randrange(1, self._mm.nr_pages)
        if int(self._mm.mem.mem_map[pfn]._refcount):
            return
        try:
            self._mm.memory_failure.memory_failure(pfn)
        except VmBug:
            raise
        except MmError:
            return
        self._broken.append(pfn)

    def _range(self) -> None:
        order = self._random.randrange(1, 6)
        pfn = alloc_contig_frozen_pages(self._mm, order, GFP_KERNEL)
        if pfn == NO_PAGE:
            return
        self._got(pfn, order, self._mm.config.init_on_alloc)
        self._bytes(pfn, order)[:] = 0x77
        if self.kernel in {"plain", "failing"}:
            self._mm.mem.mem_map["flags_f"][pfn] |= PG_private
        free_contig_frozen_range(self._mm, pfn, order)

    def _hibernate(self) -> None:
        # Contents of free pages are not in the image; owned pages are those with a reference.
        heads = self._mm.mem.mem_map["_refcount"] != 0
        held = heads.copy()
        for pfn, order in self._owned:
            held[pfn : pfn + (1 << order)] = True
        contents = self._mm.ram_bytes.reshape(-1, PAGE_SIZE)
        contents[~held[: len(contents)]] = 0xC3
        self._mm.forget_zero_claims()

    def _bytes(self, pfn: int, order: int) -> NDArray[np.uint8]:
        return self._mm.ram_bytes[pfn << PAGE_SHIFT : (pfn + (1 << order)) << PAGE_SHIFT]


def live(seed: int, kernel: str, steps: int) -> dict[str, int]:
    """Return what was noted in one life: by event, the step at which it happened first."""
    life = Life(seed, kernel)
    life.run(steps)
    return life.first


def main(arguments: Sequence[str]) -> None:
    """Print what was noted in each kernel, for a seed and a number of steps."""
    logging.disable()  # a device that fails is part of the life
    seed, steps = (int(argument) for argument in arguments)
    document: dict[str, Any] = {kernel: live(seed, kernel, steps) for kernel in KERNELS}
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
