# SPDX-License-Identifier: GPL-2.0-only
"""Where RAM lies in guest physical space, in PFNs, and which host page holds which guest page.

Pages of 4 KiB outside every span are no RAM: a ROM, a hole below 4 GiB, or a number that a
hostile guest made up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hostzero.device.pfn_runs import PfnArray
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, PAGE_SIZE


class RamSpan(NamedTuple):
    """One region of guest RAM.

    Attributes:
        first: its first PFN.
        end: the PFN behind its last.
        sub_pages: pages of 4 KiB in one host page; 1 where the host drops 4 KiB.
        phase: a PFN, modulo `sub_pages`, at which a host page begins. It is not 0 where a region
            starts at an address that is not aligned as its backing is.
    """

    first: int
    end: int
    sub_pages: int = 1
    phase: int = 0

    def host_page(self, pfn: int) -> int:
        """Return the first PFN of the host page that holds `pfn`."""
        return pfn - (pfn - self.phase) % self.sub_pages

    def holds_host_page(self, host_page: int) -> bool:
        """Return whether all of a host page, named by its first PFN, lies in the span."""
        return self.first <= host_page and host_page + self.sub_pages <= self.end

    def indices(self, ascending: PfnArray) -> slice:
        """Return where, in ascending PFNs, those of this span stand."""
        low, high = np.searchsorted(ascending, (self.first, self.end))
        return slice(int(low), int(high))


def ram_spans(memory: GuestMemory) -> tuple[RamSpan, ...]:
    """Return the regions of guest RAM in ascending order."""
    spans = []
    for region in memory.regions:
        sub_pages = max(memory.page_size(region.gpa) // PAGE_SIZE, 1)
        first = region.gpa >> PAGE_SHIFT
        # Host pages begin at multiples of their size on the host: Ram.base is congruent to the
        # file's offset, also where a received file is mapped from its middle.
        phase = (first - (region.ram.base + region.offset >> PAGE_SHIFT)) % sub_pages
        spans.append(RamSpan(first, first + (region.size >> PAGE_SHIFT), sub_pages, phase))
    return tuple(sorted(spans))


def span_at(spans: tuple[RamSpan, ...], pfn: int) -> RamSpan | None:
    """Return the span that holds a PFN; None where there is no RAM."""
    return next((span for span in spans if span.first <= pfn < span.end), None)
