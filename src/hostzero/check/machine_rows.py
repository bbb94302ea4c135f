# SPDX-License-Identifier: GPL-2.0-only
"""Which rows of the lifecycle table an operation has exercised, from what is seen before and after it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from hostzero.check.inventory import BALLOON, DEFERRED, FREE, OWNED, PARKED, POOL
from hostzero.mm.mmzone import PAGEBLOCK_ORDER
from hostzero.mm.page_flags import PG_hwpoison, PGTY_hugetlb

if TYPE_CHECKING:
    from hostzero.check.host import Host
    from hostzero.check.laws import Moment

PIN: Final = 2
"""What a step of `use_file` says that pins a page of the file, as memfd does for a driver."""


def rows_of(before: Moment, after: Moment, delta: dict[str, int], host: Host, step: str) -> Counter[str]:
    """Return how often each row was seen."""
    then, now = before.pages, after.pages
    rows: Counter[str] = Counter()
    name, *arguments = step.split(" ")
    was, is_ = then.place, now.place
    unowned_then, unowned_now = (was >= FREE) & (was <= DEFERRED), (is_ >= FREE) & (is_ <= DEFERRED)
    for report in host.reports:
        marked = now.zeroed[report.pfn] and is_[report.pfn] == FREE and now.order[report.pfn] == report.order
        rows["drain-set" if report.shown and marked else "drain-not"] += 1
        rows["isolate-report"] += 1
    came = unowned_now & (was == OWNED)
    rows["free-zeroed"] += int(np.count_nonzero(came & now.zeroed))
    rows["free-other"] += int(np.count_nonzero(came & ~now.zeroed))
    rows["free-deferred"] += int(np.count_nonzero((was == DEFERRED) & (is_ == FREE)))
    rows["deflate"] += int(np.count_nonzero((was == BALLOON) & unowned_now))
    rows["inflate-ack"] += int(
        np.count_nonzero((is_ == BALLOON) & now.zeroed & ~((was == BALLOON) & then.zeroed))
    )
    rows["pcp"] += int(
        np.count_nonzero(((was == PARKED) | (is_ == PARKED)) & (was != is_) & (then.zeroed | now.zeroed))
    )
    rows["alloc-zero"] += delta["known_zero_bytes"] >> 12
    rows["alloc"] += delta["dropped_hint_bytes"] >> 12
    rows["memcg-refused"] += delta["memcg_charge_fail"]
    rows["swap-in"] += delta["pswpin"]
    rows["check-failed"] += delta["nr_bad_pages"]
    free = (was == FREE) & (is_ == FREE)
    known = free & then.zeroed
    smaller, larger = now.order < then.order, now.order > then.order
    rows["split"] += (
        int(np.count_nonzero(known & smaller & now.zeroed)) if delta["fallback_claims"] == 0 else 0
    )
    rows["claim-block"] += delta["fallback_claims"] if known.any() else 0
    rows["merge-both"] += int(np.count_nonzero(known & larger & now.zeroed))
    rows["merge-one"] += int(np.count_nonzero(known & larger & ~now.zeroed))
    contig = name in {"take_run", "take_from_cma", "give_runs_back", "resize_gigantic_pool"}
    taken = unowned_then & (is_ == OWNED)
    rows["isolate-contig"] += int(contig and bool((unowned_then & then.zeroed & ~now.zeroed).any()))
    rows["contig-prep"] += int(contig and bool((taken & then.zeroed).any()))
    rows["contig-free"] += int(name == "give_runs_back" and bool(came.any()))
    broke = delta["num_poisoned_pages"]
    rows["take-off-buddy"] += int(broke > 0 and bool((unowned_then & (is_ == OWNED)).any()))
    rows["put-back-buddy"] += int(broke < 0 and bool(came.any()))
    broken = np.flatnonzero(then.flags & now.flags & PG_hwpoison)
    rows["broken-inside"] += int(np.count_nonzero(came[broken ^ 1]))
    rows["inflate-not"] += int(np.count_nonzero((is_ == BALLOON) & (was != BALLOON) & ~now.zeroed))
    rows["move-list"] += int(np.count_nonzero(known & (before.blocks != after.blocks)[_block_of(len(was))]))
    huge_then, huge_now = then.types == PGTY_hugetlb, now.types == PGTY_hugetlb
    rows["hugetlb-set"] += int(np.count_nonzero(unowned_then & (is_ == OWNED) & huge_now))
    rows["hugetlb-not"] += int(np.count_nonzero(unowned_then & (is_ == POOL) & huge_now))
    rows["hugetlb-return"] += int(np.count_nonzero((was == POOL) & (is_ == OWNED) & huge_now))
    pinned = name == "use_file" and arguments[1:2] == [str(PIN)]
    rows["hugetlb-reserve"] += int(np.count_nonzero((was != OWNED) & (is_ == OWNED) & huge_now)) * pinned
    rows["hugetlb-target"] += int(name == "take_huge_target" and delta["pgfree"] > 0)
    rows["hugetlb-free"] += int(np.count_nonzero(huge_then & (was == OWNED) & (unowned_now | (is_ == POOL))))
    moved = delta["pgmigrate_success"]
    if moved:
        joined = (is_ == BALLOON) & (was != BALLOON)
        left = (was == BALLOON) & (is_ != BALLOON)
        rows["balloon-migrate-new"] += int(np.count_nonzero(joined))
        rows["balloon-migrate-old"] += int(np.count_nonzero(left))
        rows["folio-migrate"] += max(moved - int(np.count_nonzero(joined)), 0)
        rows["compaction-target"] += moved if name == "compact" or delta["compact_stall"] else 0
    rows["balloon-isolate"] += moved + delta["pgmigrate_fail"] if (was == BALLOON).any() else 0
    rows["hibernate"] += int(name == "hibernate" and bool((unowned_then & then.zeroed).any()))
    return +rows


def _block_of(pages: int) -> NDArray[np.int64]:
    return np.arange(pages) >> PAGEBLOCK_ORDER
