# SPDX-License-Identifier: GPL-2.0-only
"""Where RAM is, and where its host pages begin."""

from __future__ import annotations

import numpy as np
import pytest

from hostzero.device.geometry import RamSpan, ram_spans, span_at
from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import PMD_SIZE, Gpa
from tests.device.guest import HugeMemory


def test_regions_become_spans_in_ascending_order(ram: Ram) -> None:
    memory = GuestMemory(
        [MemoryRegion(Gpa(1 << 32), ram, PMD_SIZE, PMD_SIZE), MemoryRegion(Gpa(0), ram, 0, 0x5000)]
    )
    assert ram_spans(memory) == (RamSpan(0, 5), RamSpan(1 << 20, (1 << 20) + 512))


def test_host_pages_of_2_mib(ram: Ram) -> None:
    (span,) = ram_spans(HugeMemory(ram))
    assert (span.sub_pages, span.phase) == (512, 0)
    assert [span.host_page(pfn) for pfn in (0, 511, 512, 1000)] == [0, 0, 512, 512]


class _ShiftedHugeMemory(GuestMemory):
    def page_size(self, gpa: Gpa) -> int:
        return PMD_SIZE


def test_host_pages_follow_the_backing_where_guest_addresses_do_not(ram: Ram) -> None:
    """Guest page 3 is page 512 of the RAM, so host pages begin at guest pages 3 and 515."""
    memory = _ShiftedHugeMemory([MemoryRegion(Gpa(0x3000), ram, PMD_SIZE, 2 * PMD_SIZE)])
    (span,) = ram_spans(memory)
    assert [span.host_page(pfn) for pfn in (3, 514, 515)] == [3, 3, 515]


@pytest.mark.parametrize(
    ("host_page", "whole"), [(0, False), (4, False), (8, True), (12, True), (16, False), (20, False)]
)
def test_a_host_page_that_the_span_cuts_is_not_held(host_page: int, whole: bool) -> None:
    assert RamSpan(5, 18, sub_pages=4).holds_host_page(host_page) is whole


def test_span_at_an_address_without_ram_is_none() -> None:
    spans = (RamSpan(0, 4), RamSpan(8, 12))
    assert [span_at(spans, pfn) for pfn in (3, 4, 7, 8, 12)] == [spans[0], None, None, spans[1], None]


def test_indices_of_a_span_in_ascending_pfns() -> None:
    assert RamSpan(8, 12).indices(np.array([1, 8, 11, 12, 30])) == slice(1, 3)
