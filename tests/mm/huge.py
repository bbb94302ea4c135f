# SPDX-License-Identifier: GPL-2.0-only
"""What the tests of hugetlb share: pools, mappings, and records of faults without a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hostzero.mm import MemoryManager, Process
from hostzero.mm.gfp import USER_ADDR_NONE
from hostzero.mm.hugetlb import alloc_hugetlb_folio, alloc_surplus_hugetlb_folio
from hostzero.mm.hugetlb_pool import HPG_zeroed
from hostzero.mm.hugetlb_sysfs import HugePages
from hostzero.mm.mmzone import NO_PAGE, hugepage_freelist
from hostzero.mm.vma import VM_HUGETLB, new_vma
from tests.mm.guest import dirty, dirty_free_memory, walk
from tests.mm.processes import HUGE, FakeHost, pfn_at

GIGANTIC = 11
GIGANTIC_SIZE = 4096 << GIGANTIC
MAP_GIGANTIC = 23 << 26
"""MAP_HUGETLB's size bits for a page of 8 MiB."""


def pool(mm: MemoryManager, nr: int, *, overcommit: int = 0) -> MemoryManager:
    """Give a guest `nr` persistent huge pages, dirty like all its free memory, and allow surplus ones."""
    dirty_free_memory(mm)
    assert mm.hugetlb.set_nr_hugepages(nr) == nr
    mm.hugetlb.set_nr_overcommit(overcommit)
    for pfn in in_pool(mm):
        dirty(mm, pfn, 9)
    return mm


def in_pool(mm: MemoryManager, h: int = 0, node: int = 0) -> list[int]:
    """Return the free pages of a pool in order."""
    return walk(mm.mem, int(hugepage_freelist(mm.mem, h, node)))


def counters(total: int, free: int, rsvd: int = 0, surp: int = 0) -> HugePages:
    """Return counters to compare with."""
    return HugePages(total, free, rsvd, surp)


def hpg_zeroed(mm: MemoryManager, pfn: int) -> bool:
    """Return whether a huge folio carries `HPG_zeroed`."""
    return bool(int(mm.mem.mem_map[pfn].private) & HPG_zeroed)


def zeroed_by_host(mm: MemoryManager) -> FakeHost:
    """Report all free memory to a host that zeroes it; nothing is known of anything else."""
    dirty_free_memory(mm)
    host = FakeHost(mm, capacity=1, order=9).register()
    mm.page_reporting.flush(100)
    return host


def mapping(pages: int = 4, addr: int = 0x4000_0000, *, node: int = 0) -> Any:
    """Return the record of an anonymous huge mapping of no process."""
    vma = new_vma(addr, addr + pages * HUGE, VM_HUGETLB, 0, 1, node)
    vma[0].hstate, vma[0].vm_pgoff = 0, 0
    return vma


def alloc(
    mm: MemoryManager,
    gfp: int = 0,
    *,
    vma: Any = None,
    resv: Any = None,
    offset: int = 0,
    cow: bool = False,
    fresh: int = NO_PAGE,
) -> int:
    """Call `alloc_hugetlb_folio` for an address of a mapping without a process."""
    vma = mapping() if vma is None else vma
    resv = np.zeros(4, dtype=np.int64) if resv is None else resv
    addr = int(vma[0].vm_start) + offset
    return int(alloc_hugetlb_folio(mm.mem, vma, resv, addr, cow, gfp, fresh, 0))


def alloc_surplus(mm: MemoryManager, gfp: int = 0, user_addr: int = USER_ADDR_NONE) -> int:
    """Call `alloc_surplus_hugetlb_folio` on node 0."""
    return int(alloc_surplus_hugetlb_folio(mm.mem, 0, gfp, user_addr, 0, 0))


def head_at(mm: MemoryManager, process: Process, addr: int) -> int:
    """Return the page mapped at an address."""
    pfn = pfn_at(mm, process, addr)
    assert pfn is not None
    return pfn


def run_uncompiled(program: str) -> str:
    """Return what a program prints in an interpreter without the compiler; compiled code has no spies."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout
