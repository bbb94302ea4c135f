# SPDX-License-Identifier: GPL-2.0-only
"""What is drawn fits its field, comes again with its seed, and has been wrong before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.conform.fuzz import draw
from hostzero.conform.fuzz.arena import DATA_PAGES, DATA_PFN, END_PFN, LOW_GPAS, LOW_PAGES, Arena
from hostzero.units import PAGE_SHIFT, PAGE_SIZE

SEEDS = st.integers(0, (1 << 64) - 1)
DATA = DATA_PFN << PAGE_SHIFT
FAR = (DATA_PFN + DATA_PAGES) << PAGE_SHIFT
END = END_PFN << PAGE_SHIFT
MANY = 2000


@pytest.fixture(scope="module", params=sorted(set(LOW_GPAS)))
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    with contextlib.closing(Arena(request.param)) as made:
        yield made


@given(seed=SEEDS, bits=st.integers(1, 70))
def test_a_number_fits_its_bits(seed: int, bits: int) -> None:
    rng = Random(seed)
    assert all(0 <= draw.number(rng, bits) < 1 << bits for _ in range(20))


@pytest.mark.parametrize("bits", range(1, 71))
def test_a_number_is_often_one_at_a_limit(bits: int) -> None:
    rng = Random(bits)
    drawn = {draw.number(rng, bits) for _ in range(5 * MANY)}
    limits = {0, 1, (1 << bits) - 1, (1 << bits) - 2, 1 << bits - 1, (1 << bits - 1) - 1}
    limits |= {256, 4096, (1 << bits) - 256} if bits > 16 else set()
    assert limits - {-1} <= drawn
    assert len(drawn) > 200 or bits < 16  # and others, too


@given(seed=SEEDS)
def test_an_address_is_one_of_64_bits(arena: Arena, seed: int) -> None:
    rng = Random(seed)
    assert all(0 <= draw.address(rng, arena) < 1 << 64 for _ in range(20))


def test_addresses_are_everywhere(arena: Arena) -> None:
    rng = Random(1)
    drawn = {draw.address(rng, arena) for _ in range(MANY)}
    low = range(arena.low, arena.low + LOW_PAGES * PAGE_SIZE)
    assert any(gpa % PAGE_SIZE == 0 for gpa in drawn if DATA <= gpa < FAR)
    assert any(gpa % PAGE_SIZE for gpa in drawn if DATA <= gpa < FAR)
    assert any(FAR <= gpa < END for gpa in drawn)
    assert {edge + at for edge in (DATA, FAR, END) for at in (-1, 0)} <= drawn
    assert sum(gpa in low for gpa in drawn) > 10
    assert (1 << 64) - 1 in drawn
    assert any(gpa not in low and not DATA - PAGE_SIZE <= gpa <= END + PAGE_SIZE for gpa in drawn)


@given(seed=SEEDS)
def test_a_length_fits_a_descriptor(seed: int) -> None:
    rng = Random(seed)
    assert all(0 <= draw.length(rng) < 1 << 32 for _ in range(20))


def test_lengths_are_of_parts_of_whole_and_of_many_pages() -> None:
    rng = Random(1)
    drawn = {draw.length(rng) for _ in range(MANY)}
    assert {0, 1, PAGE_SIZE - 1, PAGE_SIZE, 2 << 20, 1 << 31, (1 << 32) - 1} <= drawn
    assert {PAGE_SIZE * count for count in range(1, 64)} <= drawn


@given(seed=SEEDS, count=st.sampled_from([0, 1, 2, 255, 256, 8192]))
def test_page_numbers_fit_theirs(seed: int, count: int) -> None:
    drawn = draw.pfns(Random(seed), count)
    assert len(drawn) == count
    assert all(0 <= pfn < 1 << 32 for pfn in drawn)


def test_page_numbers_are_of_each_kind() -> None:
    drawn = [tuple(draw.pfns(Random(seed), 64)) for seed in range(60)]
    memory = range(DATA_PFN, END_PFN)
    assert (0,) * 64 in drawn
    assert any(pfns == tuple(range(pfns[0], pfns[0] + 64)) and pfns[0] > 0 for pfns in drawn)
    assert any(all(pfn in memory for pfn in pfns) and len(set(pfns)) < 64 for pfns in drawn)
    assert any(all(pfn in memory for pfn in pfns[::2]) and not any(pfns[1::2]) for pfns in drawn)
    assert any((1 << 32) - 1 in pfns for pfns in drawn)


def test_one_seed_draws_the_same_and_another_does_not(arena: Arena) -> None:
    def drawn(seed: int) -> list[object]:
        rng = Random(seed)
        return [
            (draw.number(rng, 32), draw.address(rng, arena), draw.length(rng), draw.pfns(rng, 5))
            for _ in range(20)
        ]

    assert drawn(1) == drawn(1) != drawn(2)
