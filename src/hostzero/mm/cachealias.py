# SPDX-License-Identifier: GPL-2.0-only
"""Stale cache lines on machines whose caches alias (kernel: `cpu_dcache_is_aliasing`, cacheflush.h).

Such a data cache may hold one page twice, under the kernel's address and under the user's.
What the kernel writes through its address a user does not see until those lines are written
back, and if that happens late it destroys what the user has written meanwhile. This is why
user pages are zeroed through an address of the user's colour (`clear_user_page`), and why
patch 12 has a guard that patch 23 narrowed.

The model keeps what goes wrong and nothing else:

* Guest RAM is what a user sees. `Memory.kernel_lines` says by page what the kernel's lines
  hold that RAM does not: 0 for nothing, else the byte they are filled with, plus 1.
* Clearing and poisoning through the kernel's address fills the lines and leaves RAM alone.
  `flush_dcache_folio` writes them back; so does `evict`, which may happen at any time.
* `folio_zero_user` drops the lines and zeroes RAM: it is right at once.
* The kernel sees its own lines first. Whoever uses a page as the kernel (page tables, drivers
  with their rings, the zero page) has its lines written back when it gets the page, and from
  then on reads and writes RAM: kernel-only pages never have lines.
* A page asked for without `__GFP_ZERO` will be written by who asked, through the kernel's
  address and with a flush behind (copies, swap-in), so its lines go when it is allocated.
* A host that drops a page's memory puts other memory in its place; the lines of the former are
  gone. A page that claims to be zero has none.

Decided here, because the sources say nothing of it: the last three rules, and that a kernel
page is clean when it is freed. Lines of the user's own address are not modelled: RAM stands
for them. Instruction caches have no model; `cpu_icache_aliasing` is what the guard tests.
"""

from __future__ import annotations

import numpy as np

from hostzero.jit import compiled, inline
from hostzero.mm.mmzone import WORDS_PER_PAGE, Memory

_EVERY_BYTE = 0x0101_0101_0101_0101


@compiled
def fill_kernel_lines(mem: Memory, pfn: int, count: int, byte: int) -> None:
    """Write whole pages through the kernel's address: the bytes stay in the cache."""
    for page in range(pfn, pfn + count):
        mem.kernel_lines[page] = byte + 1


@compiled
def discard_kernel_lines(mem: Memory, pfn: int, count: int) -> None:
    """Drop the kernel's lines of some pages without writing them back (kernel: `discard_old_kernel_data`)."""
    for page in range(pfn, pfn + count):
        mem.kernel_lines[page] = 0


@compiled
def evict(mem: Memory, pfn: int, count: int) -> None:
    """Write the kernel's lines of some pages back over guest RAM, whatever it holds by now."""
    for page in range(pfn, pfn + count):
        line = mem.kernel_lines[page]
        if line == 0:
            continue
        word = np.uint64(line - 1) * np.uint64(_EVERY_BYTE)
        first = page * WORDS_PER_PAGE
        for at in range(first, first + WORDS_PER_PAGE):
            mem.ram[at] = word
        mem.kernel_lines[page] = 0


@inline
def flush_dcache_folio(mem: Memory, pfn: int, order: int) -> None:
    """Make what the kernel wrote to a block visible at every address (kernel: same name).

    Costs a comparison on machines whose data cache does not alias.
    """
    if mem.vm[0].cpu_dcache_aliasing != 0:
        evict(mem, pfn, 1 << order)


@compiled
def has_kernel_lines(mem: Memory, pfn: int, count: int) -> bool:
    """Return whether the kernel's address holds something of these pages that RAM does not."""
    if mem.vm[0].cpu_dcache_aliasing != 0:
        for page in range(pfn, pfn + count):
            if mem.kernel_lines[page] != 0:
                return True
    return False


def evict_all(mem: Memory) -> None:
    """Write every line back: the worst that a cache may do, at the worst time."""
    evict(mem, 0, len(mem.kernel_lines))
