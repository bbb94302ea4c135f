# SPDX-License-Identifier: GPL-2.0-only
"""Debug assertions name the page they are about, and are off when the configuration says so."""

from __future__ import annotations

import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager
from hostzero.mm.debug import VM_BUG_ON_PAGE, describe_bug, describe_page
from hostzero.mm.gfp import GFP_KERNEL
from hostzero.mm.mmzone import NO_PAGE
from tests.mm.conftest import Boot


def test_an_assertion_that_holds_remembers_nothing(mm: MemoryManager) -> None:
    assert not VM_BUG_ON_PAGE(mm.mem, False, 5)
    assert int(mm.mem.vm[0].bug_pfn) == NO_PAGE


def test_a_failed_assertion_remembers_its_page(mm: MemoryManager) -> None:
    assert VM_BUG_ON_PAGE(mm.mem, True, 5)
    assert int(mm.mem.vm[0].bug_pfn) == 5


def test_assertions_are_off_without_debug_vm(boot: Boot) -> None:
    mem = boot(debug_vm=False).mem
    assert not VM_BUG_ON_PAGE(mem, True, 5)
    assert int(mem.vm[0].bug_pfn) == NO_PAGE


def test_a_page_is_described_in_one_line(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.mem.mem_map[pfn].mapping = 9
    text = describe_page(mm.mem, pfn)
    for part in (f"pfn {pfn:#x} ", "refcount 1 ", "mapcount -1 ", "mapping 9 ", "block Unmovable"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("pfn", [-1, 2048, 10**9])
def test_a_page_that_does_not_exist_is_described_too(mm: MemoryManager, pfn: int) -> None:
    assert describe_page(mm.mem, pfn) == f"pfn {pfn:#x} is outside of mem_map"


def test_a_bug_carries_its_page_unless_it_is_about_none(mm: MemoryManager) -> None:
    assert describe_bug(mm.mem, VmBug("text")) == "text"
    mm.mem.vm[0].bug_pfn = 7
    assert describe_bug(mm.mem, VmBug("text")).startswith("text: pfn 0x7 flags ")
