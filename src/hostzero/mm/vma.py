# SPDX-License-Identifier: GPL-2.0-only
"""One mapping of an address space, as compiled code sees it (kernel: `struct vm_area_struct`).

The record carries what a fault needs of its address space too (page table,
owner, node), so that a fault takes one record and no pointer.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from hostzero.mm.records import as_records
from hostzero.units import PAGE_SHIFT

VM_READ: Final = 0x1
VM_WRITE: Final = 0x2
VM_SHARED: Final = 0x8
VM_NORESERVE: Final = 0x20_0000
VM_HUGETLB: Final = 0x40_0000
VM_UNINITIALIZED: Final = 0x1000_0000_0000  # mmap(MAP_UNINITIALIZED): pages with old contents
VM_HUGEPAGE: Final = 0x2000_0000
VM_NOHUGEPAGE: Final = 0x4000_0000

VMA_DTYPE: Final = np.dtype(
    [
        ("vm_start", np.int64),
        ("vm_end", np.int64),
        ("vm_flags", np.int64),
        ("pgd", np.int64),  # the address space's top table, a page frame number
        ("mm_id", np.int64),  # owner of the pages: mem_map[].mapping; never 0
        ("node", np.int64),  # of the CPU that the process runs on
        ("vm_pgoff", np.int64),  # page number of vm_start in its file; vm_start's own if anonymous
        ("policy", np.int64),  # memory policy (`mempolicy`); 0 is MPOL_DEFAULT
        ("nodemask", np.int64),  # nodes of the policy, a bit each
        ("hstate", np.int64),  # hugetlb page size of the mapping (`hugetlb`), -1 for none
        ("file", np.int64),  # number of the hugetlb mapping (`hugetlbfs.HugetlbMapping`), 0 for none
    ],
    align=True,
)


def new_vma(start: int, end: int, flags: int, pgd: int, mm_id: int, node: int) -> Any:
    """Return the record of a mapping `[start, end)` with nothing mapped yet."""
    vma = as_records(np.zeros(1, dtype=VMA_DTYPE))
    vma[0] = (start, end, flags, pgd, mm_id, node, start >> PAGE_SHIFT, 0, 0, -1, 0)
    return vma
