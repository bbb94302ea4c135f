# SPDX-License-Identifier: GPL-2.0-only
"""Memory cgroups: who is charged for a page, and who may have no more (kernel: `mm/memcontrol.c`).

A folio is charged once, to the cgroup of the process that faulted it in and to each cgroup
above that, and uncharged when its last reference goes. The root (0) has no limit and is not
counted, as in the kernel, so a guest without cgroups pays one comparison a folio.

Left out: a charge that fails reclaims nothing (Linux would swap the cgroup's pages out
first), page tables and swap slots are not charged, and a page that comes back from swap is
charged to the process that reads it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hostzero.errors import MmError, UsageError
from hostzero.jit import compiled, far, inline
from hostzero.mm.mmzone import NR_MEMCGS, UNLIMITED, Memory
from hostzero.mm.page_flags import compound_order
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

ROOT_MEMCG: Final = 0


@compiled
def page_counter_uncharge(mem: Memory, memcg: int, nr_pages: int) -> None:
    """Take pages off a cgroup and every cgroup above it (kernel: same name)."""
    while memcg > ROOT_MEMCG:
        mem.memcg[memcg].usage -= nr_pages
        memcg = mem.memcg[memcg].parent


@compiled
def page_counter_try_charge(mem: Memory, memcg: int, nr_pages: int) -> bool:
    """Add pages to a cgroup and every cgroup above it, or to none of them (kernel: same name)."""
    at = memcg
    while at > ROOT_MEMCG:
        if mem.memcg[at].usage + nr_pages > mem.memcg[at].max_pages:
            mem.memcg[at].failcnt += 1
            while memcg != at:  # what was added below goes again
                mem.memcg[memcg].usage -= nr_pages
                memcg = mem.memcg[memcg].parent
            return False
        mem.memcg[at].usage += nr_pages
        at = mem.memcg[at].parent
    return True


@inline
def mem_cgroup_charge(mem: Memory, pfn: int, nr_pages: int, memcg: int) -> bool:
    """Charge a folio to a cgroup; False if that or one above it is at its limit.

    Source: same name. `pfn` is the folio's head; the root takes everything and writes nothing.
    """
    if memcg == ROOT_MEMCG:
        return True
    return charge_memcg(mem, pfn, nr_pages, memcg)


@far
def charge_memcg(mem: Memory, pfn: int, nr_pages: int, memcg: int) -> bool:
    """Charge a folio to a cgroup that is not the root (kernel: same name)."""
    if not page_counter_try_charge(mem, memcg, nr_pages):
        mem.vm[0].memcg_charge_fail += 1
        return False
    mem.mem_map[pfn].memcg_data = memcg + 1
    return True


@inline
def mem_cgroup_uncharge(mem: Memory, pfn: int) -> None:
    """Give a folio's charge back, if it has one; before the folio is freed (kernel: same name)."""
    if mem.mem_map[pfn].memcg_data != 0:
        uncharge_folio(mem, pfn)


@far
def uncharge_folio(mem: Memory, pfn: int) -> None:
    """Give back the charge of a folio that has one (kernel: same name)."""
    memcg = mem.mem_map[pfn].memcg_data - 1
    mem.mem_map[pfn].memcg_data = 0
    page_counter_uncharge(mem, memcg, 1 << compound_order(mem, pfn))


@compiled
def memcg_reparent(mem: Memory, memcg: int, parent: int) -> None:
    """Move the charges of a cgroup that goes to the one above it (kernel: `memcg_reparent_objcgs`).

    The cgroups above have counted them all along.
    """
    data = 0 if parent == ROOT_MEMCG else parent + 1
    for pfn in range(mem.vm[0].nr_pages):
        if mem.mem_map[pfn].memcg_data == memcg + 1:
            mem.mem_map[pfn].memcg_data = data


class MemoryCgroups:
    """The cgroups of a guest: `memory.max`, `memory.current` and the tree (`manager.memcg`).

    A cgroup is a small number; 0 is the root. `Process.memcg` puts a process into one.
    """

    def __init__(self, mem: Memory) -> None:
        """Begin with the root alone."""
        self._mem = mem

    def create(self, max_bytes: int | None, parent: int = ROOT_MEMCG) -> int:
        """Return a new cgroup below `parent` that may use `max_bytes`; None is no limit.

        Raises:
            UsageError: `parent` does not exist or `max_bytes` is negative.
            MmError: -ENOMEM, there are as many cgroups as there can be.
        """
        self.check(parent)
        limit = _pages(max_bytes)
        (free,) = np.nonzero(self._mem.memcg.in_use == 0)
        if not len(free):
            raise MmError(f"memcg: -ENOMEM: there are {NR_MEMCGS} cgroups already")
        memcg = int(free[0])
        record = self._mem.memcg[memcg]
        record.parent, record.usage, record.max_pages, record.failcnt, record.in_use = parent, 0, limit, 0, 1
        return memcg

    def set_max(self, memcg: int, max_bytes: int | None) -> None:
        """Set `memory.max`; below what is in use, further charges fail and nothing is taken away.

        Linux would reclaim down to the limit, and kill when that fails.
        """
        self._mem.memcg[self._not_root(memcg)].max_pages = _pages(max_bytes)

    def usage_bytes(self, memcg: int) -> int:
        """Return `memory.current`: bytes charged to a cgroup and to those below it."""
        return int(self._mem.memcg[self._not_root(memcg)].usage) << PAGE_SHIFT

    def failcnt(self, memcg: int) -> int:
        """Return how many charges failed at this cgroup's own limit."""
        return int(self._mem.memcg[self._not_root(memcg)].failcnt)

    def remove(self, memcg: int) -> None:
        """Remove a cgroup; what is still charged to it becomes its parent's.

        Raises:
            MmError: -EBUSY, a process or another cgroup is in it.
        """
        self._not_root(memcg)
        cgroups, processes = self._mem.memcg, self._mem.mms
        if np.any((cgroups.in_use != 0) & (cgroups.parent == memcg)):
            raise MmError(f"memcg: -EBUSY: there are cgroups in cgroup {memcg}")
        if np.any((processes.pgd != 0) & (processes.memcg == memcg)):
            raise MmError(f"memcg: -EBUSY: there are processes in cgroup {memcg}")
        memcg_reparent(self._mem, memcg, int(cgroups[memcg].parent))
        cgroups[memcg].in_use = 0

    def describe_limit(self, memcg: int, nr_pages: int = 1) -> str:
        """Return an error's text: which cgroup, `memcg` or one above it, refuses `nr_pages`."""
        at = memcg
        while self._mem.memcg[at].usage + nr_pages <= self._mem.memcg[at].max_pages:
            at = int(self._mem.memcg[at].parent)
            if at <= ROOT_MEMCG:
                return f"cgroup {memcg} refused it"
        record = self._mem.memcg[at]
        used, most = int(record.usage) << (PAGE_SHIFT - 10), int(record.max_pages) << (PAGE_SHIFT - 10)
        return f"cgroup {at} is at its limit, {used} of {most} KiB in use"

    def check(self, memcg: int) -> int:
        """Return `memcg`.

        Raises:
            UsageError: there is no such cgroup.
        """
        if not 0 <= memcg < NR_MEMCGS or not self._mem.memcg[memcg].in_use:
            raise UsageError(f"there is no cgroup {memcg}")
        return memcg

    def _not_root(self, memcg: int) -> int:
        if memcg == ROOT_MEMCG:
            raise UsageError("the root cgroup has no limit and is not counted")
        return self.check(memcg)


def _pages(max_bytes: int | None) -> int:
    # Rounded down, as page_counter_memparse does.
    if max_bytes is None:
        return UNLIMITED
    if max_bytes < 0:
        raise UsageError(f"a cgroup cannot use {max_bytes} bytes")
    return min(max_bytes // PAGE_SIZE, UNLIMITED)
