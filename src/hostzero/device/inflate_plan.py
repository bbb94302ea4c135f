# SPDX-License-Identifier: GPL-2.0-only
"""What one inflate request asks for: which runs to drop, and which PFNs a success proves.

This is the arithmetic of an inflate without its effects. `plan_inflate` says what to discard;
the caller discards and hands back what was proven; `InflatePlan.zero_mask` turns that into the
verdict for each PFN. A PFN can be claimed only if it was named by this request, lies in RAM,
holds nothing that the device writes afterwards, and lies in a run whose discard was proven.

PFNs of one large host page may come in several requests. Those of the earlier requests were
answered "not known to be zero", which stays true enough; those of the request that completes
the page are claimed, because the whole host page is dropped then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hostzero.device.byte_ranges import ByteRanges
from hostzero.device.geometry import RamSpan, span_at
from hostzero.device.partial_pages import PartialPages
from hostzero.device.pfn_runs import Mask, PfnArray, PfnRun, descending_runs, join_runs, mark_runs
from hostzero.units import PAGE_SHIFT


class SkippedPages(NamedTuple):
    """Pages of 4 KiB that an inflate request names and no discard covers, by reason."""

    outside_ram: int
    device_writes: int
    partial_host_page: int


@dataclass(frozen=True, slots=True)
class InflatePlan:
    """The discards that a request leads to, in ascending order.

    Attributes:
        pfns: the PFNs of the request, ascending, each once; shape (m,).
        candidates: which of them may be claimed if a discard covers them; shape (m,).
        discards: the runs to discard. A run is a whole number of host pages, and may hold
            pages of earlier requests.
        skipped: why the other pages are not among them.
    """

    pfns: PfnArray
    candidates: Mask
    discards: list[PfnRun]
    skipped: SkippedPages

    def zero_mask(self, proven: list[PfnRun]) -> Mask:
        """Return for each of `pfns` whether it is proven to read as zero; shape (m,).

        Args:
            proven: those of `discards` that the backing proved to read as zero.
        """
        return mark_runs(self.pfns, proven) & self.candidates


def plain_discards(
    pfns: Sequence[int], spans: tuple[RamSpan, ...], device_writes: ByteRanges
) -> list[PfnRun] | None:
    """Return the discards of a request that nobody wants verdicts of, if it is a simple one.

    Simple is: in descending order, in one span of 4 KiB pages, and nothing near that the device writes.
    Then `plan_inflate` comes to the same discards and skips nothing.

    Args:
        pfns: PFNs in units of 4 KiB, as the request has them.
        spans: guest RAM.
        device_writes: bytes that the device writes after the discards.

    Returns:
        The runs to discard in ascending order; None for any other request.
    """
    runs = descending_runs(pfns)
    if not runs or not _is_plain(runs[0].first, runs[-1].end - 1, spans, device_writes):
        return None
    return runs


def plan_inflate(
    pfns: PfnArray, spans: tuple[RamSpan, ...], device_writes: ByteRanges, partial: PartialPages
) -> InflatePlan:
    """Return what to discard for a request, and take its sub-pages into the balloon.

    Args:
        pfns: PFNs in units of 4 KiB, ascending, each once; shape (m,). Any value may be there.
        spans: guest RAM.
        device_writes: bytes that the device writes after the discards; their pages are left
            alone, and so is a whole large host page around them.
        partial: sub-pages of large host pages that are in the balloon; changed here.
    """
    if pfns.size and _is_plain(int(pfns[0]), int(pfns[-1]), spans, device_writes):
        return InflatePlan(pfns, np.ones(pfns.size, dtype=np.bool_), join_runs(pfns), SkippedPages(0, 0, 0))
    writes = device_writes.pages_mask(pfns)
    in_ram = np.zeros(pfns.size, dtype=np.bool_)
    discards: list[PfnRun] = []
    for span in spans:
        indices = span.indices(pfns)
        in_ram[indices] = True
        runs = join_runs(pfns[indices][~writes[indices]])
        if span.sub_pages == 1:
            discards += runs
            continue
        complete = sorted({page for run in runs for page in partial.add(span, run)})
        # A large page whose other part the device still writes stays as it is.
        whole = [page for page in complete if not _holds(device_writes, page, span.sub_pages)]
        discards += _join_host_pages(whole, span.sub_pages)
    candidates = in_ram & ~writes
    covered = int(np.count_nonzero(mark_runs(pfns, discards) & candidates))
    uncovered = int(np.count_nonzero(candidates)) - covered
    skipped = SkippedPages(
        outside_ram=int(np.count_nonzero(~in_ram)),
        device_writes=int(np.count_nonzero(in_ram & writes)),
        partial_host_page=uncovered,
    )
    return InflatePlan(pfns, candidates, discards, skipped)


# Whether the pages from `first` to `last` are in one span of 4 KiB pages, with nothing near that the device
# writes: what nearly every request of an honest guest is. It spares the masks.
def _is_plain(first: int, last: int, spans: tuple[RamSpan, ...], device_writes: ByteRanges) -> bool:
    span = span_at(spans, first)
    if span is None or span.sub_pages != 1 or last >= span.end:
        return False
    return not device_writes.overlaps(first << PAGE_SHIFT, (last - first + 1) << PAGE_SHIFT)


def _holds(device_writes: ByteRanges, host_page: int, sub_pages: int) -> bool:
    return device_writes.overlaps(host_page << PAGE_SHIFT, sub_pages << PAGE_SHIFT)


def _join_host_pages(host_pages: list[int], sub_pages: int) -> list[PfnRun]:
    joined: list[PfnRun] = []
    for page in host_pages:
        if joined and joined[-1].end == page:
            joined[-1] = PfnRun(joined[-1].first, joined[-1].pages + sub_pages)
        else:
            joined.append(PfnRun(page, sub_pages))
    return joined
