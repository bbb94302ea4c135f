# SPDX-License-Identifier: GPL-2.0-only
"""Moving one anonymous folio to other pages (kernel: `mm/migrate.c`, one folio at a time).

A folio that is about to be moved is isolated: it carries one more reference, so that it
cannot be freed and nobody else isolates it. It can be moved if its references are those of
its mappings and this one; any other means that somebody works on the page: it is pinned.

The new page gets contents, owner and flags of the old one. The old page is freed as every
page is: it held an owner's data, and whatever was known of it before is known no more.
"""

from __future__ import annotations

from hostzero.errors import VmBug
from hostzero.jit import compiled, far
from hostzero.mm.buddy import FPI_NONE
from hostzero.mm.clear_page import copy_pages
from hostzero.mm.debug import VM_BUG_ON_PAGE
from hostzero.mm.mmzone import Memory
from hostzero.mm.page_flags import (
    PG_active,
    PG_dirty,
    PG_hwpoison,
    PG_locked,
    PG_lru,
    PG_mlocked,
    PG_owner_2,
    PG_private,
    PG_referenced,
    PG_reserved,
    PG_swapbacked,
    PG_unevictable,
    PG_uptodate,
    PG_writeback,
    PGTY_none,
    compound_head,
    compound_order,
)
from hostzero.mm.page_free import __free_frozen_pages, put_page
from hostzero.mm.rmap import folio_mappings, remap_folio

MIGRATED_FLAGS = (
    PG_referenced
    | PG_uptodate
    | PG_dirty
    | PG_lru
    | PG_active
    | PG_owner_2
    | PG_swapbacked
    | PG_unevictable
    | PG_mlocked
)
"""What `folio_migrate_flags` carries over. Not `PG_private`: on a new page it would be a zero claim."""

_STAYS_PUT = PG_locked | PG_writeback | PG_reserved | PG_private


@far
def folio_isolate(mem: Memory, pfn: int) -> bool:
    """Isolate the anonymous folio that `pfn` heads; False if it cannot be moved.

    Source: `isolate_migratepages_block`, `folio_isolate_lru`. Kernel pages, page tables, hugetlb
    pages and the zero page have no owner in the reverse map; a page that is locked, under
    writeback or pinned, or of which a part is broken, stays as well.
    """
    page = mem.mem_map[pfn]
    if page.mapping == 0 or page.page_type != PGTY_none or (page.flags_f & _STAYS_PUT) != 0:
        return False
    if compound_head(mem, pfn) != pfn or page._refcount <= 0:
        return False
    order = compound_order(mem, pfn)
    if page._refcount != folio_mappings(mem, pfn, order):
        return False
    for part in range(pfn, pfn + (1 << order)):
        if (mem.mem_map[part].flags_f & PG_hwpoison) != 0:
            return False
    page._refcount += 1
    return True


@compiled
def folio_putback(mem: Memory, pfn: int, cpu: int) -> None:
    """Undo an isolation (kernel: `putback_movable_pages`); frees a folio that is unmapped by now."""
    put_page(mem, pfn, cpu)


@compiled
def folio_was_freed(mem: Memory, pfn: int) -> bool:
    """Return whether only its isolation keeps this folio: its owner has unmapped it."""
    page = mem.mem_map[pfn]
    return page.page_type == PGTY_none and page._refcount == 1 and page._mapcount < 0


@compiled
def free_unused_target(mem: Memory, pfn: int, order: int, cpu: int) -> None:
    """Free a frozen block to which nothing was moved; nothing is known of its contents."""
    __free_frozen_pages(mem, pfn, order, FPI_NONE, cpu)


@far
def migrate_folio(mem: Memory, dst: int, src: int, cpu: int) -> bool:
    """Move the isolated folio `src` to `dst` and free its pages; False if it is pinned.

    Source: `migrate_folio_unmap`, `migrate_folio_move`. `dst` is a frozen folio of the same
    order, without a zero hint; it stays frozen if this fails. Neither page is a balloon's.
    """
    m = mem.mem_map
    order = compound_order(mem, src)
    if VM_BUG_ON_PAGE(mem, compound_order(mem, dst) != order or m[dst]._refcount != 0, dst):
        raise VmBug("migrate_folio: the target is not a frozen folio of the same order")
    if VM_BUG_ON_PAGE(mem, (m[dst].flags_f & PG_private) != 0, dst):
        raise VmBug("migrate_folio: the target still has a zero hint (PG_private)")
    mapped = folio_mappings(mem, src, order)
    if mapped == 0 or m[src]._refcount != mapped + 1:
        return False
    copy_pages(mem, dst, src, 1 << order)
    remap_folio(mem, src, dst, order)
    m[dst].flags_f |= m[src].flags_f & MIGRATED_FLAGS
    m[dst].mapping = m[src].mapping
    m[dst].index = m[src].index
    m[dst].memcg_data = m[src].memcg_data
    m[dst]._refcount = mapped
    m[src].flags_f &= ~MIGRATED_FLAGS
    m[src].memcg_data = 0
    m[src]._refcount = 1
    for i in range(1 << order):
        m[dst + i]._mapcount = m[src + i]._mapcount
        m[src + i]._mapcount = -1
    put_page(mem, src, cpu)
    return True
