# SPDX-License-Identifier: GPL-2.0-only
"""Writing and comparing pages, and the order in which a user's folio is zeroed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.mm import MemoryManager
from hostzero.mm.clear_page import (
    PAGE_POISON,
    ZERO_USER_STEPS,
    clear_pages,
    clear_pages_singly,
    fill_pages,
    first_word_not,
    folio_zero_user,
    kernel_poison_pages,
    kernel_unpoison_pages,
    zero_user_range,
)
from tests.mm.conftest import Boot
from tests.mm.guest import booted, dirty, page_bytes, reads_zero

PFN = 64


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """The smallest guest that boots."""
    return boot(4)


@pytest.mark.parametrize("clear", [clear_pages, clear_pages_singly])
def test_clearing_touches_exactly_its_pages(mm: MemoryManager, clear: object) -> None:
    dirty(mm, PFN - 1, 3)
    assert callable(clear)
    clear(mm.mem, PFN, 3)
    assert [reads_zero(mm, PFN - 1 + page) for page in range(5)] == [False, True, True, True, False]


def test_filling_touches_exactly_its_pages(mm: MemoryManager) -> None:
    fill_pages(mm.mem, PFN, 2, 0x5A)
    assert (page_bytes(mm, PFN, 2) == 0x5A).all()
    assert reads_zero(mm, PFN - 1)
    assert reads_zero(mm, PFN + 2)


@pytest.mark.parametrize("byte", [0, 1, 0x5A, PAGE_POISON, 0xFF])
@pytest.mark.parametrize("offset", [0, 7, 4096, 8191])
def test_one_wrong_byte_is_found(mm: MemoryManager, byte: int, offset: int) -> None:
    fill_pages(mm.mem, PFN, 2, byte)
    assert first_word_not(mm.mem, PFN, 2, byte) == -1
    page_bytes(mm, PFN, 2)[offset] = byte ^ 0x80
    assert first_word_not(mm.mem, PFN, 2, byte) == PFN * 512 + offset // 8


def test_poison_is_written_and_missed(mm: MemoryManager) -> None:
    kernel_poison_pages(mm.mem, PFN, 3)
    assert (page_bytes(mm, PFN, 3) == 0xAA).all()
    kernel_unpoison_pages(mm.mem, PFN, 3)
    assert mm.vm_stats().poison_errors == 0
    for page in (0, 2):
        page_bytes(mm, PFN + page)[100:200] = 0
    kernel_unpoison_pages(mm.mem, PFN, 3)
    assert mm.vm_stats().poison_errors == 2


def pages_in_order(nr_pages: int, fault: int) -> list[int]:
    """Return the pages in the order in which `folio_zero_user` zeroes them."""
    order: list[int] = []
    for step in range(ZERO_USER_STEPS):
        start, end = zero_user_range(step, nr_pages, fault)
        order += [page for page in range(start, end) if step != 2 or page != fault]
    return order


@given(
    st.integers(1, 10).flatmap(lambda order: st.tuples(st.just(1 << order), st.integers(0, (1 << order) - 1)))
)
def test_every_page_is_zeroed_once_and_the_faulting_one_last(case: tuple[int, int]) -> None:
    nr_pages, fault = case
    order = pages_in_order(nr_pages, fault)
    assert sorted(order) == list(range(nr_pages))
    assert order[-1] == fault
    neighbours = [page for page in range(nr_pages) if 0 < abs(page - fault) <= 2]
    assert order[-1 - len(neighbours) : -1] == neighbours


@given(st.integers(0, 9), st.integers(0, 2**47 - 1))
def test_all_of_a_folio_and_nothing_else_is_zeroed(order: int, user_addr: int) -> None:
    with booted(4) as mm:
        mm.ram_bytes[:] = 0x5A
        folio_zero_user(mm.mem, 512, order, user_addr)
        assert reads_zero(mm, 512, order)
        assert int((mm.ram_bytes == 0).sum()) == 4096 << order
