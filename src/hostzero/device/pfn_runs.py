# SPDX-License-Identifier: GPL-2.0-only
"""PFNs of one request, sorted, freed of duplicates and joined into runs.

A driver sends PFNs in the order of its list, which is the reverse of the order of allocation,
and one discard per PFN costs more processor time than everything else that the device does.
Sorted, the 262144 PFNs of a GiB make about 1200 runs. Nothing here touches memory: it is
arithmetic over arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hostzero.virtio.balloon import mask_to_bitmap

PfnArray = NDArray[np.int64]
"""PFNs in units of 4 KiB, shape (n,)."""

Mask = NDArray[np.bool_]
"""One truth for each entry of a `PfnArray`, shape (n,)."""


class PfnRun(NamedTuple):
    """`pages` pages of 4 KiB from page `first` on."""

    first: int
    pages: int

    @property
    def end(self) -> int:
        """The page behind the last one."""
        return self.first + self.pages


class SortedPfns(NamedTuple):
    """The PFNs of a request in ascending order, and where each one stood.

    Attributes:
        unique: the PFNs, ascending, each once; shape (m,).
        position: for the n-th PFN of the request its index in `unique`; shape (n,). A PFN that
            a request names twice has two entries here and one in `unique`.
    """

    unique: PfnArray
    position: NDArray[np.intp]


def sort_pfns(pfns: PfnArray) -> SortedPfns:
    """Return the PFNs of a request sorted; none is lost and none is there twice."""
    # Linux names the pages of a fresh block in descending order: then there is nothing to sort, which
    # would cost as much as all the rest of a request.
    if pfns.size and bool((pfns[:-1] > pfns[1:]).all()):
        return SortedPfns(pfns[::-1], np.arange(pfns.size - 1, -1, -1))
    unique, position = np.unique(pfns, return_inverse=True)
    return SortedPfns(unique, position.reshape(-1))


def join_runs(ascending: PfnArray) -> list[PfnRun]:
    """Return the fewest runs that hold exactly the given PFNs, which ascend without duplicates."""
    if not ascending.size:
        return []
    first, last = int(ascending[0]), int(ascending[-1])
    if last - first == ascending.size - 1:
        return [PfnRun(first, ascending.size)]
    breaks = np.flatnonzero(np.diff(ascending) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [ascending.size]))
    return [
        PfnRun(int(ascending[start]), int(end - start))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def descending_runs(pfns: Sequence[int]) -> list[PfnRun] | None:
    """Return the runs of PFNs that stand in descending order, in ascending order; None if they do not.

    The plain twin of `sort_pfns` and `join_runs`, for the order in which Linux names the pages of a fresh
    block: for 256 numbers a loop is cheaper than arrays, whose first touch of a dozen functions is most
    of what a request costs when a guest runs on the same processor.
    """
    runs: list[PfnRun] = []
    if not pfns:
        return runs
    end = below = pfns[0] + 1
    for pfn in pfns:
        if pfn != below - 1:
            if pfn >= below:
                return None
            runs.append(PfnRun(below, end - below))
            end = pfn + 1
        below = pfn
    runs.append(PfnRun(below, end - below))
    return runs[::-1]


def mark_runs(ascending: PfnArray, runs: list[PfnRun]) -> Mask:
    """Return for each of the ascending PFNs whether one of the runs holds it."""
    mask = np.zeros(ascending.size, dtype=np.bool_)
    for run in runs:
        low, high = np.searchsorted(ascending, (run.first, run.end))
        mask[low:high] = True
    return mask


def zero_bitmap(pfns: SortedPfns, zero: Mask) -> bytes:
    """Return the bitmap that answers a request of bit 7.

    Bit n, counted from the least significant bit of byte n / 8, is the n-th PFN of the
    request, whatever its value. Bits behind the last PFN are clear.

    Args:
        pfns: the request.
        zero: for each of `pfns.unique` whether it is proven to read as zero.
    """
    return mask_to_bitmap(zero[pfns.position])
