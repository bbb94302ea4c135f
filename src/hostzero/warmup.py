# SPDX-License-Identifier: GPL-2.0-only
"""Compiling everything once, where a user can see it.

The first start on a machine compiles the memory manager, which takes tens of seconds.
Every command that needs it calls `warm_up`, so that the wait has a name and a progress;
the compiled form is kept, and later starts find it (see `hostzero.jit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hostzero import jit
from hostzero.machine import Machine
from hostzero.mm.clear_page import clear_pages_singly
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmap import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    MAP_HUGETLB,
    MAP_NORESERVE,
)
from hostzero.mm.page_alloc import alloc_pages_bulk
from hostzero.mm.page_free import free_pages_bulk
from hostzero.mm.verify import verify_memory
from hostzero.units import PMD_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

_MEMORY = 128 << 20  # with 64 MiB or less nothing is reported, and so that part not compiled
_SIZE = 8 << 20


def warm_up(begin: Callable[[str, int], None], step: Callable[[str], None]) -> None:
    """Use once what a run uses, unless that has been done for these sources.

    Args:
        begin: called with a title and the number of steps, if there is anything to do.
        step: called after each step with what it was.
    """
    if jit.is_warm():
        return
    begin("compiling, once for this version", 7)
    with Machine(memory=_MEMORY) as machine:
        step("boot and probe")
        with machine.spawn() as process:
            address = process.mmap(_SIZE)
            process.fill(address, _SIZE, 1)
            step("faults")
            process.write(address, process.read(address, 1))
            process.madvise(address, 4096, MADV_DONTNEED)
            process.touch(address, _SIZE)
            process.find_nonzero(address, _SIZE)
            process.madvise(address, _SIZE, MADV_NOHUGEPAGE)
            process.madvise(address, _SIZE, MADV_POPULATE_WRITE)
            step("access")
            machine.mm.hugetlb.set_nr_overcommit(1)
            for flags in (MAP_HUGETLB, MAP_HUGETLB | MAP_NORESERVE):
                address = process.mmap(PMD_SIZE, flags)
                process.madvise(address, PMD_SIZE, MADV_POPULATE_WRITE)
                process.fill(address, PMD_SIZE, 1)
                process.munmap(address, PMD_SIZE)
            step("huge pages")
        machine.flush()
        step("reporting")
        machine.balloon(1 << 20)
        machine.balloon(0)
        step("ballooning")
        verify_memory(machine.mm.mem)
        _use_batches(machine)
        step("batches")
    jit.mark_warm()


def _use_batches(machine: Machine) -> None:
    mem = machine.mm.mem
    pfns = np.zeros(4, dtype=np.int64)
    got = alloc_pages_bulk(mem, GFP_KERNEL, 0, 0, 0, pfns)
    clear_pages_singly(mem, int(pfns[0]), 1)
    free_pages_bulk(mem, pfns[:got], 0, 0)
