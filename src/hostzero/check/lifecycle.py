# SPDX-License-Identifier: GPL-2.0-only
"""Who sets, keeps and clears a zero claim: the table of `PG_zeroed` and `HPG_zeroed`, as data.

Each row is one event, what becomes of the claim, and the places in `mm/` and `driver/` that do
it. Searches count how often each row happened, by its id; `docs/safety.md` shows the table with
each place's line of code, which `hostzero.check.lifecycle_doc` finds. Whoever writes a new place
that touches a claim adds it here: a test compares the table with the source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

PG_ZEROED: Final = "PG_zeroed"
HPG_ZEROED: Final = "HPG_zeroed"


@dataclass(frozen=True, slots=True)
class Row:
    """One event in the life of a zero claim.

    Attributes:
        id: the short name by which searches count it.
        event: what happens.
        effect: what becomes of the claim.
        where: the functions that see to it, as "room.module.function" below `hostzero`.
        statements: for each of `where` a piece of its text that marks the line; "" for its `def`.
        flag: which claim it is about.
    """

    id: str
    event: str
    effect: str
    where: tuple[str, ...]
    statements: tuple[str, ...]
    flag: str = PG_ZEROED


def _row(row_id: str, event: str, effect: str, *places: str) -> Row:
    # A place is "room.module.function", or that and " @ " and the text that marks its line.
    flag = HPG_ZEROED if row_id.startswith("hugetlb-") else PG_ZEROED
    where = tuple(place.partition(" @ ")[0] for place in places)
    statements = tuple(place.partition(" @ ")[2] for place in places)
    return Row(row_id, event, effect, where, statements, flag)


_READ_AND_CLEARED: Final = " @ __ClearPageZeroed(mem, pfn)"

LIFECYCLE: Final[tuple[Row, ...]] = (
    # -- reporting
    _row(
        "drain-set",
        "the host zeroed a reported block: bit set, report succeeded, key on, block back unmerged",
        "set",
        "mm.page_reporting.page_reporting_drain @ __SetPageZeroed(mem, pfn)",
    ),
    _row(
        "drain-not",
        "any other outcome of a report",
        "stays clear",
        "mm.page_reporting.page_reporting_drain @ if not reported:",
        "driver.reporting.FreePageReporting.virtballoon_free_page_report @ zeroed[position] =",
    ),
    # -- the way in
    _row(
        "free-zeroed",
        "free with `FPI_ZEROED`, unless poison was written over it",
        "set, after prepare",
        "mm.page_free.__free_frozen_pages @ __SetPageZeroed(mem, pfn)",
        "mm.page_free.__free_pages_ok @ __SetPageZeroed(mem, pfn)",
        "mm.prep.fpi_zeroed_holds",
    ),
    _row(
        "free-deferred",
        "deferred by a free that may not wait for the zone lock",
        "kept; whoever frees it later adds nothing",
        "mm.prep.add_page_to_zone_llist",
        "mm.page_free.free_deferred_pages @ split_large_buddy",
    ),
    _row(
        "free-other",
        "any other free, a stale `PG_private` included",
        "cleared, head and tails",
        "mm.prep.__free_pages_prepare @ PAGE_FLAGS_CHECK_AT_PREP",
        "mm.prep.free_tail_pages_prepare @ PAGE_FLAGS_CHECK_AT_PREP",
    ),
    # -- inside the buddy lists
    _row(
        "merge-both",
        "merge, both halves marked",
        "both cleared, then set on the merged head",
        "mm.buddy.__free_one_page @ __SetPageZeroed(mem, pfn)",
    ),
    _row(
        "merge-one",
        "merge, one half marked or none",
        "cleared on both",
        "mm.buddy.__free_one_page @ __ClearPageZeroed(mem, pfn)",
    ),
    _row(
        "split",
        "split by an allocation",
        "copied to each part, kept on the part taken",
        "mm.buddy.expand @ __SetPageZeroed(mem, upper)",
        "mm.buddy.page_del_and_expand @ zeroed = PageZeroed",
    ),
    _row(
        "claim-block",
        "pageblock claimed by another migrate type",
        "copied to each part",
        "mm.fallback.try_to_claim_block @ zeroed = PageZeroed",
    ),
    _row(
        "split-large",
        "freed over several pageblocks, or split because an isolated pageblock ends inside",
        "copied to each part",
        "mm.buddy.split_large_buddy @ __SetPageZeroed(mem, pfn)",
    ),
    _row(
        "move-list",
        "moved between free lists, isolated ones too",
        "kept",
        "mm.fallback.__move_freepages_block @ list_add_tail",
        "mm.page_isolation.__move_freepages_block_isolate @ __move_freepages_block(",
    ),
    _row(
        "pcp",
        "parked on a per-CPU list, or drained from one",
        "kept",
        "mm.pcplist.free_frozen_page_commit @ list_add",
        "mm.pcplist.rmqueue_bulk @ list_add",
        "mm.pcplist.free_pcppages_bulk @ __free_one_page",
    ),
    # -- the way out
    _row(
        "alloc",
        "allocated",
        "read, then cleared, before the page is checked",
        "mm.page_alloc.rmqueue_buddy" + _READ_AND_CLEARED,
        "mm.pcplist.__rmqueue_pcplist" + _READ_AND_CLEARED,
        "mm.pcplist.rmqueue_pcplist_fitting" + _READ_AND_CLEARED,
    ),
    _row(
        "alloc-zero",
        "allocated with a wish for zeros, from a marked block",
        "the hint cancels the zeroing; without that wish it is dropped",
        "mm.prep.post_alloc_hook @ known_zero_bytes",
    ),
    _row(
        "memcg-refused",
        "zeroed for a fault, then refused by the cgroup",
        "stays clear: freed as any other page",
        "mm.anon_folio.alloc_charged_folio @ __free_frozen_pages",
    ),
    _row(
        "swap-in",
        "allocated for a page that comes back from swap",
        "read and cleared; the hint is dropped, nobody asks for zeros",
        "mm.swap.alloc_swap_folio @ alloc_charged_folio",
    ),
    _row(
        "check-failed",
        "the page check of an allocation failed",
        "the hint goes with the page",
        "mm.page_alloc.rmqueue_buddy @ if not check_new_pages",
        "mm.pcplist.__rmqueue_pcplist @ if not check_new_pages",
    ),
    # -- isolation and contiguous runs
    _row(
        "isolate-report",
        "isolated for a report",
        "cleared",
        "mm.page_isolation.__isolate_free_page @ __ClearPageZeroed",
        "mm.page_reporting.page_reporting_fill @ __isolate_free_page",
    ),
    _row(
        "isolate-contig",
        "isolated for a contiguous range",
        "cleared; what reaches over an end goes back without it",
        "mm.contig.isolate_freepages_range @ __isolate_free_page",
    ),
    _row(
        "unisolate",
        "taken off and put back to merge when its pageblock is unisolated",
        "cleared",
        "mm.page_isolation.unset_migratetype_isolate @ __isolate_free_page",
    ),
    _row(
        "contig-prep",
        "leaves as part of a contiguous run",
        "cleared once more before use; prepared as not known to be zero",
        "mm.contig.prep_contig_folio @ __ClearPageZeroed",
        "mm.contig.split_free_frozen_pages @ __ClearPageZeroed",
    ),
    _row(
        "contig-free",
        "contiguous run or CMA folio freed",
        "cleared, as by any other free",
        "mm.contig.free_contig_frozen_range",
        "mm.contig.free_contig_pages @ FPI_NONE",
    ),
    # -- the balloon
    _row(
        "inflate-ack",
        "inflate acknowledged, bit trusted",
        "set on the balloon page",
        "mm.balloon.balloon_set_zeroed @ SetPageZeroed",
        "driver.inflate.Inflation.fill_balloon @ set_zeroed",
    ),
    _row(
        "inflate-not",
        "inflate acknowledged, bit clear or not trusted",
        "stays clear",
        "driver.inflate.trusted_pages",
        "driver.inflate.Inflation._tell_inflate @ np.zeros",
    ),
    _row(
        "deflate",
        "deflated, or left in the balloon by a device that was reset",
        "sampled and cleared, then freed with `FPI_ZEROED`",
        "mm.balloon.balloon_put_page @ ClearPageZeroed",
        "driver.inflate.Inflation._release_pages_balloon @ release",
    ),
    _row(
        "balloon-migrate-new",
        "balloon page migrated: the new page",
        "set if the device showed it to be zero, as at inflation",
        "mm.balloon.balloon_page_replace @ SetPageZeroed",
    ),
    _row(
        "balloon-migrate-old",
        "balloon page migrated: the old page",
        "sampled and cleared, then freed with `FPI_ZEROED`",
        "mm.balloon.balloon_page_replace @ balloon_put_page",
        "mm.balloon.balloon_put_page @ ClearPageZeroed",
    ),
    _row(
        "balloon-isolate",
        "balloon page off its list to be migrated, or put back",
        "kept",
        "mm.balloon.balloon_page_isolate @ list_del",
        "mm.balloon.balloon_page_putback @ list_add",
    ),
    # -- broken pages
    _row(
        "take-off-buddy",
        "a page of the block breaks and is taken off",
        "cleared for the whole block: neither the page nor a remainder has it",
        "mm.memory_failure.take_page_off_buddy @ __ClearPageZeroed",
    ),
    _row(
        "put-back-buddy",
        "a broken page is put back, past prepare",
        "cleared; contents made what free pages have",
        "mm.memory_failure.put_page_back_buddy @ PAGE_FLAGS_CHECK_AT_PREP",
    ),
    _row(
        "broken-inside",
        "a block freed with a broken page in it, or put back from a report or a deferral with one",
        "not set, `FPI_ZEROED` or not, and cleared; its healthy pages are freed one by one",
        "mm.prep.free_healthy_pages @ __ClearPageZeroed",
    ),
    # -- migration and compaction
    _row(
        "folio-migrate",
        "folio migrated",
        "the new page has none, or is refused; the old page is freed as unknown",
        "mm.migrate_folio.migrate_folio @ PG_private",
        "mm.migrate_folio.migrate_folio @ put_page(mem, src",
    ),
    _row(
        "compaction-target",
        "target of compaction",
        'cleared when its block was isolated; the hook hears "not known to be zero"',
        "mm.compaction_scan.isolate_freepages_block @ __isolate_free_page",
        "mm.compaction_scan.compaction_alloc @ post_alloc_hook(",
    ),
    _row(
        "captured",
        "captured by direct compaction",
        "merged as above, then read and cleared: it serves the request",
        "mm.buddy.compaction_capture",
        "mm.page_alloc.__alloc_pages_direct_compact" + _READ_AND_CLEARED,
    ),
    # -- hibernation
    _row(
        "hibernate",
        "guest restored from hibernation",
        "cleared everywhere; with poisoning or `init_on_free` free pages are overwritten again",
        "mm.snapshot.forget_list @ __ClearPageZeroed",
        "mm.snapshot.forget_zero_claims @ ClearPageZeroed",
        "driver.virtio_balloon.VirtioBalloon.restore @ forget_zero_claims",
    ),
    # -- huge pages of a pool
    _row(
        "hugetlb-set",
        "surplus page allocated with `__GFP_ZERO`",
        "set",
        "mm.hugetlb.account_surplus_hugetlb_folio @ |= HPG_zeroed",
    ),
    _row(
        "hugetlb-not",
        "surplus page allocated for a reservation, or page of the persistent pool",
        "stays clear",
        "mm.hugetlb.gather_surplus_pages @ alloc_surplus_hugetlb_folio",
        "mm.hugetlb.alloc_pool_huge_folio @ alloc_buddy_frozen_folio",
    ),
    _row(
        "hugetlb-return",
        "`alloc_hugetlb_folio` returns",
        "cleared, after it was asked",
        "mm.hugetlb.alloc_hugetlb_folio @ folio_clear_hugetlb_zeroed",
    ),
    _row(
        "hugetlb-reserve",
        "`alloc_hugetlb_folio_reserve` takes a page for a file",
        "read, then cleared",
        "mm.hugetlb.alloc_hugetlb_folio_reserve @ folio_clear_hugetlb_zeroed",
    ),
    _row(
        "hugetlb-target",
        "`alloc_hugetlb_folio_nodemask` (a target of migration)",
        "left alone; cleared when freed",
        "mm.hugetlb.alloc_hugetlb_folio_nodemask @ dequeue_hugetlb_folio_nodemask",
    ),
    _row(
        "hugetlb-free",
        "`free_huge_folio`, a failed charge and a lost race included",
        "cleared",
        "mm.hugetlb_pool.return_huge_folio @ &= ~HPG_zeroed",
    ),
)

ROW_IDS: Final = tuple(row.id for row in LIFECYCLE)
"""The ids in the order of the table."""


def unknown_rows(ids: Iterable[str]) -> list[str]:
    """Return those of `ids` that no row has: misspelt ones, which nobody would ever see counted."""
    return sorted(set(ids) - set(ROW_IDS))
