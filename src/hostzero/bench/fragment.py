# SPDX-License-Identifier: GPL-2.0-only
"""A guest whose free memory lies in pieces: the recipe, and what it left.

`RECIPE` says what is done, in order; every choice is drawn from one seed. Nothing in it is tuned to
a result: how much is churned is swept, and what came out is measured (`unusable_share`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np

from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmap import MADV_DONTNEED, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MAP_UNINITIALIZED
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NR_PAGE_ORDERS, PAGE_ALLOC_COSTLY_ORDER
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from typing import Self

    from numpy.typing import NDArray

    from hostzero.machine import Machine

ROUNDS: Final = 3
SURVIVORS: Final = 64
MAX_BURST: Final = 32
KERNEL_ORDERS: Final = (8, 4, 2, 1)
"""How often the kernel asks for blocks of order 0, 1, 2 and 3."""

RECIPE: Final = (
    "Boot. All memory is free, in blocks of order 10.",
    (
        f"{ROUNDS} times: take the covered share of the guest's memory in small allocations, in bursts of 1 "
        f"to {MAX_BURST} pages. A half of the bursts is a program's, which wants its pages zeroed and writes "
        "them; a quarter is movable, not zeroed and written, as a page cache that reads files; a quarter is "
        f"the kernel's: unmovable, not zeroed, blocks of order 0 to 3 in proportions "
        f"{':'.join(map(str, KERNEL_ORDERS))}. Then free all but about one allocation in {SURVIVORS}, in "
        "random order; these stay for good. Report (flush), as a guest would within two seconds."
    ),
    "Give back what is parked on per-CPU lists, and report once more.",
)
"""How a guest is fragmented."""

_DIRT: Final = 0xAA


class SmallPages:
    """A process that takes 4 KiB pages one after the other."""

    def __init__(self, machine: Machine, size: int, *, zeros: bool) -> None:
        """Map room for `size` bytes; pages want zeros, or (`zeros` False) come as they are."""
        self._process = machine.spawn()
        self._start = self._process.mmap(size, 0 if zeros else MAP_UNINITIALIZED)
        self._process.madvise(self._start, size, MADV_NOHUGEPAGE)
        self._pages = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.exit()

    def write(self, pages: int) -> int:
        """Take and write the next pages; return how many."""
        self._process.fill(self._start + self._pages * PAGE_SIZE, pages * PAGE_SIZE, _DIRT)
        self._pages += pages
        return pages

    def populate(self, pages: int) -> int:
        """Take the next pages without writing to them; return how many."""
        self._process.madvise(self._start + self._pages * PAGE_SIZE, pages * PAGE_SIZE, MADV_POPULATE_WRITE)
        self._pages += pages
        return pages

    def first_nonzero(self) -> int | None:
        """Return the first address that does not read as zero, or None."""
        return self._process.find_nonzero(self._start, self._pages * PAGE_SIZE) if self._pages else None

    def free_all_but(self, survivors: int, rng: random.Random) -> None:
        """Free all but one page in `survivors`, the stretches between them in random order."""
        kept = [page for page in range(self._pages) if rng.random() * survivors < 1]
        edges = [-1, *kept, self._pages]
        gaps = [(low + 1, high) for low, high in itertools.pairwise(edges) if high > low + 1]
        rng.shuffle(gaps)
        for low, high in gaps:
            self._process.madvise(self._start + low * PAGE_SIZE, (high - low) * PAGE_SIZE, MADV_DONTNEED)


class KernelPages:
    """What the kernel allocates for itself: unmovable, not zeroed."""

    def __init__(self, machine: Machine) -> None:
        """Begin with nothing."""
        self._mm = machine.mm
        self._bursts: list[tuple[int, NDArray[np.int64]]] = []

    def take(self, pages: int, order: int = 0) -> int:
        """Take about `pages` pages in blocks of an order, at least one; return how many pages."""
        pfns = self._mm.alloc_pages_bulk(GFP_KERNEL, max(pages >> order, 1), order=order)
        self._bursts.append((order, pfns))
        return len(pfns) << order

    def free_all_but(self, survivors: int, rng: random.Random) -> None:
        """Free all but one block in `survivors`, burst by burst in random order."""
        rng.shuffle(self._bursts)
        for order, pfns in self._bursts:
            going = np.array([rng.random() * survivors >= 1 for _ in pfns], dtype=np.bool_)
            self._mm.free_pages_bulk(pfns[going], order)
        self._bursts.clear()

    def free(self) -> None:
        """Free everything."""
        for order, pfns in self._bursts:
            self._mm.free_pages_bulk(pfns, order)
        self._bursts.clear()


def bursts(pages: int, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Yield who takes how many pages next, until `pages` pages have been named."""
    while pages > 0:
        burst = min(rng.randint(1, MAX_BURST), pages)
        yield rng.choices(("program", "cache", "kernel"), (2, 1, 1))[0], burst
        pages -= burst


def fragment(machine: Machine, covered: float, rng: random.Random) -> None:
    """Fragment a freshly booted guest by the recipe of this module."""
    pages = int(covered * machine.ram.size) // PAGE_SIZE
    for _ in range(ROUNDS if pages else 0):
        _churn(machine, pages, rng)
        machine.flush()
    machine.mm.drain_all_pages()
    machine.flush()


def _churn(machine: Machine, pages: int, rng: random.Random) -> None:
    # The processes are never ended: their survivors stay, as the kernel's do.
    program = SmallPages(machine, pages * PAGE_SIZE, zeros=True)
    cache = SmallPages(machine, pages * PAGE_SIZE, zeros=False)
    kernel = KernelPages(machine)
    for who, burst in bursts(pages, rng):
        if who == "program":
            program.write(burst)
        elif who == "cache":
            cache.write(burst)
        else:
            (order,) = rng.choices(range(PAGE_ALLOC_COSTLY_ORDER + 1), KERNEL_ORDERS)
            kernel.take(burst, order)
    for holder in (program, cache, kernel):
        holder.free_all_but(SURVIVORS, rng)


def free_blocks(machine: Machine) -> NDArray[np.int64]:
    """Return how many free blocks there are of each order, what is parked on CPUs not counted."""
    blocks: NDArray[np.int64] = machine.mm.mem.zone.nr_free.sum(axis=0)
    return blocks


def unusable_share(machine: Machine) -> float:
    """Return the share of free memory in blocks too small for a 2 MiB page.

    The kernel's unusable free space index for order 9 (`extfrag/unusable_index` in debugfs).
    """
    pages = free_blocks(machine) << np.arange(NR_PAGE_ORDERS)
    return float(pages[:HPAGE_PMD_ORDER].sum() / pages.sum())


def free_huge_pages(machine: Machine) -> int:
    """Return how many 2 MiB pages the free blocks of order 9 and 10 hold."""
    blocks = free_blocks(machine)
    return int(
        sum(blocks[order] << (order - HPAGE_PMD_ORDER) for order in range(HPAGE_PMD_ORDER, NR_PAGE_ORDERS))
    )
