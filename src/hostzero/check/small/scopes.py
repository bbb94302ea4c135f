# SPDX-License-Identifier: GPL-2.0-only
"""The guests that the exhaustive search goes through.

A *scope* is a small guest and the actors that take part in it. Nobody can try everything at once,
so each scope is narrow enough to be closed, and together they let every actor meet every other.
Two scopes at the end have all actors at once; they are gone through as deep as time allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from hostzero.check.small.small_guest import Setup


@dataclass(frozen=True)
class Scope:
    """A small guest, and what is to be learned from it.

    Attributes:
        name: what it is called in notes.
        about: what interleaves in it, in one sentence.
        setup: how it is made.
        breaking: the pages that may break; None for all. Each that does doubles the states.
    """

    name: str
    about: str
    setup: Any
    breaking: tuple[int, ...] | None = None


_ALLOCATOR: Final = ("alloc", "free", "drain")
_REPORT: Final = ("report-fill", "report-send", "report-answer", "report-drain")
_BALLOON: Final = ("balloon-take", "balloon-answer", "balloon-ack", "balloon-leave", "balloon-free")
_FAILURE: Final = ("break", "break-handle", "break-mend")

OF_A_PAGE: Final = ("break", "break-mend")
"""The steps whose argument is the page that breaks."""

_TINY: Final = Setup(
    pages=16,
    reporting_order=3,
    capacity=1,
    balloon=0,
    owners=1,
    max_order=4,
    reclaim=False,
    pcp_high=2,
    pcp_batch=1,
    kinds=(15, 2),  # all that an allocation can be told, zeros among it; a movable page as it is
    hows=(1, 3),  # dirty; cleared and freed as known to be zero
    actors=_ALLOCATOR,
)
_BUDDY: Final = replace(_TINY, pcp_high=1)
"""Nothing stays on a CPU's list: only the free lists are left."""

SCOPES: Final[tuple[Scope, ...]] = (
    Scope(
        "owners",
        "an owner leaves its block in every way: clean, dirty, with flags, as zero, shared",
        replace(_TINY, kinds=(0, 2, 15), hows=(0, 1, 2, 3, 4, 5)),
    ),
    Scope(
        "unchecked owners",
        "the same without the allocator's own checks: an owner's PG_private comes back with its block",
        replace(_TINY, debug_vm=False, hows=(1, 2, 3)),
    ),
    Scope(
        "report", "each step of a report, an owner, and a drain", replace(_BUDDY, actors=_ALLOCATOR + _REPORT)
    ),
    Scope(
        "reported blocks split",
        "three owners: a reported block is split when all the others are taken",
        replace(_BUDDY, owners=3, max_order=2, kinds=(15,), hows=(1,), actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "report and CPUs",
        "each step of a report, and two CPUs that allocate, free, park and drain",
        replace(_TINY, cpus=2, max_order=0, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "trust",
        "the host's word is believed or not, and all of memory is lost in hibernation, between reports",
        replace(_BUDDY, max_order=1, actors=(*_ALLOCATOR, *_REPORT, "trust", "hibernate")),
    ),
    Scope(
        "balloon",
        "two balloon pages in flight, answered in any order, deflated, and an owner",
        replace(_TINY, balloon=2, max_order=0, actors=_ALLOCATOR + _BALLOON),
    ),
    Scope(
        "balloon and report",
        "a balloon page in flight during a report",
        replace(_BUDDY, balloon=1, max_order=0, actors=_ALLOCATOR + _BALLOON + _REPORT),
    ),
    Scope(
        "failure",
        "a page breaks, is dealt with later, and is mended, wherever it is",
        replace(_TINY, max_order=2, actors=_ALLOCATOR + _FAILURE),
        breaking=(5,),
    ),
    Scope(
        "failure and report",
        "a page breaks while its block is reported",
        replace(_BUDDY, max_order=1, actors=_ALLOCATOR + _REPORT + _FAILURE),
        breaking=(9,),
    ),
    Scope(
        "failure and balloon",
        "a page breaks while it is in the balloon, or on its way there or back",
        replace(_BUDDY, balloon=1, max_order=0, actors=_ALLOCATOR + _BALLOON + _FAILURE),
        breaking=(0,),
    ),
    Scope(
        "poisoning",
        "free pages hold a pattern, with reports and a balloon",
        replace(_TINY, poisoning=True, balloon=1, actors=_ALLOCATOR + _REPORT + _BALLOON),
    ),
    Scope(
        "init_on_free",
        "free pages are zeroed, with reports and a balloon",
        replace(_TINY, init_on_free=True, balloon=1, actors=_ALLOCATOR + _REPORT + _BALLOON),
    ),
    Scope(
        "init_on_alloc",
        "every allocation is zeroed, with reports",
        replace(_BUDDY, init_on_alloc=True, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "deferred frees",
        "blocks are freed under the zone's lock and wait",
        replace(_BUDDY, max_order=1, hows=(1, 3, 6)),
    ),
    Scope(
        "deferred frees, large blocks",
        "a free that takes the zone's lock frees what waited: only large blocks go that way",
        replace(_BUDDY, pages=32, kinds=(2,), hows=(3, 6)),
    ),
    Scope(
        "placement",
        "blocks are chosen by whether they are zero as wanted",
        replace(_BUDDY, zero_aware=True, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "reports, two blocks",
        "two blocks in a batch, answered in any order",
        replace(_BUDDY, capacity=2, max_order=3, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "migrate types",
        "movable and unmovable owners take each other's pageblock",
        replace(_TINY, owners=2, max_order=1, kinds=(0, 1, 2, 15)),
    ),
    Scope(
        "reports and two owners",
        "each step of a report, and two owners of blocks of up to 4 pages",
        replace(_BUDDY, owners=2, max_order=2, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "32 pages",
        "each step of a report, and an owner",
        replace(_BUDDY, pages=32, reporting_order=4, max_order=5, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "32 pages, smaller blocks",
        "the same, reported by blocks of 8 pages, two at a time",
        replace(_BUDDY, pages=32, capacity=2, max_order=5, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "two CPUs and two owners",
        "blocks of one and two pages are parked, drained, split and merged",
        replace(_TINY, cpus=2, owners=2, max_order=1),
    ),
    Scope(
        "all actors, 16 pages",
        "everything at once, as deep as time allows",
        Setup(pages=16, cpus=2, balloon=2, owners=3, capacity=2, pcp_high=4),
    ),
    Scope(
        "all actors, 32 pages",
        "everything at once, as deep as time allows",
        Setup(pages=32, cpus=2, balloon=2, owners=3, capacity=2, max_order=5, pcp_high=4),
    ),
)
