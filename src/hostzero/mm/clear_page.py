# SPDX-License-Identifier: GPL-2.0-only
"""Writing and checking whole pages: zeroing, copying, poisoning, comparing.

Kernel: `clear_pages`, `folio_zero_user` (`mm/memory.c`), `mm/page_poison.c`. The words
written are guest RAM itself. The zeroing order of `folio_zero_user` is data
(`zero_user_range`), so that a test can look at it.
"""

from __future__ import annotations

import numpy as np

from hostzero.jit import COMPILER_ON, compiled, inline
from hostzero.mm.cachealias import discard_kernel_lines, fill_kernel_lines
from hostzero.mm.mmzone import WORDS_PER_PAGE, Memory
from hostzero.units import PAGE_SHIFT

if COMPILER_ON:
    from numba import types

    # The C library's memset, found by name when compiled code is loaded: unlike a ctypes
    # pointer it can be cached.
    memset = types.ExternalFunction("memset", types.voidptr(types.uintp, types.int32, types.uintp))
    memcpy = types.ExternalFunction("memcpy", types.voidptr(types.uintp, types.uintp, types.uintp))
else:
    import ctypes

    def memset(address: int, byte: int, count: int) -> None:
        # ctypes takes no numpy integers.
        ctypes.memset(int(address), int(byte), int(count))

    def memcpy(to: int, source: int, count: int) -> None:
        ctypes.memmove(int(to), int(source), int(count))


PAGE_POISON = 0xAA
_EVERY_BYTE = 0x0101_0101_0101_0101

ZERO_USER_STEPS = 4
_NEIGHBOURS = 2  # pages on each side of the fault that are cleared late, to stay cached


@inline
def clear_pages(mem: Memory, pfn: int, count: int) -> None:
    """Zero `count` pages from `pfn` on: one `memset` of guest RAM."""
    memset(mem.vm[0].ram_base + (pfn << PAGE_SHIFT), 0, count << PAGE_SHIFT)


@inline
def clear_kernel_pages(mem: Memory, pfn: int, count: int) -> None:
    """Zero pages through the kernel's address (kernel: `clear_highpages_kasan_tagged`).

    With an aliasing data cache the zeros stay in it for now (`cachealias`).
    """
    if mem.vm[0].cpu_dcache_aliasing != 0:
        fill_kernel_lines(mem, pfn, count, 0)
    else:
        clear_pages(mem, pfn, count)


@inline
def copy_pages(mem: Memory, to: int, source: int, count: int) -> None:
    """Copy `count` pages from `source` on to `to` and on (kernel: `folio_mc_copy`); no overlap."""
    base = mem.vm[0].ram_base
    memcpy(base + (to << PAGE_SHIFT), base + (source << PAGE_SHIFT), count << PAGE_SHIFT)


@inline
def zero_user_range(step: int, nr_pages: int, fault: int) -> tuple[int, int]:
    """Return the pages `[start, end)` of a folio that step `step` of `folio_zero_user` zeroes.

    Step 0 is everything above the fault's neighbourhood, step 1 everything below it,
    step 2 the neighbourhood's other pages (see `folio_zero_user`), step 3 the faulting page.
    `fault` is the faulting page's number in the folio.
    """
    low = max(fault - _NEIGHBOURS, 0)
    high = min(fault + _NEIGHBOURS + 1, nr_pages)
    if step == 0:
        return high, nr_pages
    if step == 1:
        return 0, low
    if step == 2:
        return low, high
    return fault, fault + 1


@compiled
def folio_zero_user(mem: Memory, pfn: int, order: int, user_addr: int) -> None:
    """Zero a folio for a user so that the faulting page comes last and stays in cache.

    `user_addr` may be any address in the folio's mapping; the folio starts at the address
    aligned down to its size. Sources: `folio_zero_user`, and patch 10 for configurations without
    huge pages: there the whole folio is cleared from that start on, in one go. Such a kernel has
    folios of other sizes all the same, so what counts is the alignment, and it is this one for
    every configuration. The zeroing goes through an address of the user's colour, so that no
    line of the kernel's can hide it or come back (`cachealias`).
    """
    nr_pages = 1 << order
    if mem.vm[0].cpu_dcache_aliasing != 0:
        discard_kernel_lines(mem, pfn, nr_pages)
    fault = (user_addr >> PAGE_SHIFT) & (nr_pages - 1)
    if order == 0:
        clear_pages(mem, pfn, 1)
        return
    for step in range(ZERO_USER_STEPS):
        start, end = zero_user_range(step, nr_pages, fault)
        if step == 2:
            clear_pages(mem, pfn + start, fault - start)
            clear_pages(mem, pfn + fault + 1, end - fault - 1)
        else:
            clear_pages(mem, pfn + start, end - start)


@compiled
def kernel_poison_pages(mem: Memory, pfn: int, count: int) -> None:
    """Fill freed pages with the poison pattern (kernel: `__kernel_poison_pages`)."""
    if mem.vm[0].cpu_dcache_aliasing != 0:
        fill_kernel_lines(mem, pfn, count, PAGE_POISON)
    else:
        fill_pages(mem, pfn, count, PAGE_POISON)


@inline
def fill_pages(mem: Memory, pfn: int, count: int, byte: int) -> None:
    """Fill `count` pages from `pfn` on with one byte value."""
    memset(mem.vm[0].ram_base + (pfn << PAGE_SHIFT), byte, count << PAGE_SHIFT)


@compiled
def clear_pages_singly(mem: Memory, pfn: int, count: int) -> None:
    """Zero `count` pages with one `memset` each, as order-0 allocations do: a yardstick."""
    for page in range(pfn, pfn + count):
        clear_pages(mem, page, 1)


@compiled
def first_word_not(mem: Memory, pfn: int, count: int, byte: int) -> int:
    """Return the first word of the pages that is not made of `byte`, or -1."""
    start = pfn * WORDS_PER_PAGE
    word = np.uint64(byte) * np.uint64(_EVERY_BYTE)
    for i in range(start, start + count * WORDS_PER_PAGE):
        if mem.ram[i] != word:
            return i
    return -1


@compiled
def kernel_unpoison_pages(mem: Memory, pfn: int, count: int) -> None:
    """Count pages whose poison pattern was overwritten (kernel: `__kernel_unpoison_pages`)."""
    aliasing = mem.vm[0].cpu_dcache_aliasing != 0
    for page in range(pfn, pfn + count):
        if aliasing and mem.kernel_lines[page] == PAGE_POISON + 1:
            continue  # the kernel sees its own lines first
        if first_word_not(mem, page, 1, PAGE_POISON) >= 0:
            mem.vm[0].nr_poison_errors += 1
