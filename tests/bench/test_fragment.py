# SPDX-License-Identifier: GPL-2.0-only
"""The recipe: what it leaves, that a seed repeats it, and that the measures measure."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from hostzero.bench.fragment import (
    MAX_BURST,
    SURVIVORS,
    KernelPages,
    SmallPages,
    bursts,
    fragment,
    free_blocks,
    free_huge_pages,
    unusable_share,
)
from hostzero.machine import Machine
from hostzero.mm import MmConfig
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NR_PAGE_ORDERS
from hostzero.mm.verify import verify_memory

MIB = 1 << 20


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(80 * MIB, mm=MmConfig(debug_vm=False)) as machine:
        yield machine


def free_pages(machine: Machine) -> int:
    return int((free_blocks(machine) << np.arange(NR_PAGE_ORDERS)).sum())


@pytest.mark.compiled_only
def test_more_churn_leaves_more_pieces() -> None:
    degrees = []
    for covered in (0.0, 1 / 16, 1 / 4):
        with Machine(80 * MIB) as machine:
            fragment(machine, covered, random.Random(1))
            verify_memory(machine.mm.mem)
            degrees.append(unusable_share(machine))
    assert degrees == sorted(degrees)
    assert degrees[0] < 0.05 < degrees[1] < 0.2 < degrees[2]


@pytest.mark.compiled_only
def test_a_seed_repeats_everything() -> None:
    def left(seed: int) -> list[int]:
        with Machine(80 * MIB) as machine:
            fragment(machine, 1 / 8, random.Random(seed))
            return [*free_blocks(machine).tolist(), int(machine.mm.mem.vm[0].known_zero_allocs[0])]

    assert left(1) == left(1)
    assert left(1) != left(2)


@pytest.mark.compiled_only
def test_what_survives_is_about_one_in_so_many(machine: Machine) -> None:
    machine.mm.drain_all_pages()
    before = free_pages(machine)
    program = SmallPages(machine, 32 * MIB, zeros=True)
    program.populate(8192)
    program.free_all_but(SURVIVORS, random.Random(2))
    machine.mm.drain_all_pages()
    tables = 24  # page tables stay
    assert 8192 / SURVIVORS / 2 < before - free_pages(machine) < 8192 / SURVIVORS * 2 + tables


@pytest.mark.compiled_only
def test_a_program_wants_zeros_and_a_cache_does_not(machine: Machine) -> None:
    vm = machine.mm.mem.vm[0]
    for zeros in (True, False):
        with SmallPages(machine, 4 * MIB, zeros=zeros) as holder:
            holder.populate(1)  # page tables want zeros in any case
            before = int(vm.zero_allocs[0])
            assert holder.populate(100) == 100
            assert int(vm.zero_allocs[0]) - before == (100 if zeros else 0)
            assert holder.write(3) == 3


@pytest.mark.compiled_only
def test_kernel_pages_come_in_whole_blocks_and_go(machine: Machine) -> None:
    machine.mm.drain_all_pages()
    before = free_pages(machine)
    kernel = KernelPages(machine)
    assert kernel.take(5, 3) == 8
    assert kernel.take(16, 2) == 16
    kernel.free_all_but(1, random.Random(1))  # one in one survives: all
    machine.mm.drain_all_pages()
    assert before - free_pages(machine) == 24
    kernel.take(7)
    kernel.free()
    machine.mm.drain_all_pages()
    assert before - free_pages(machine) == 24


def test_bursts_name_exactly_the_pages() -> None:
    asked = list(bursts(5000, random.Random(3)))
    assert sum(pages for _, pages in asked) == 5000
    assert all(1 <= pages <= MAX_BURST for _, pages in asked)
    by = {who: sum(pages for one, pages in asked if one == who) for who in ("program", "cache", "kernel")}
    assert by["program"] > by["cache"] > 0 < by["kernel"] < by["program"]


@pytest.mark.compiled_only
def test_the_measures_count_what_is_free(machine: Machine) -> None:
    machine.mm.drain_all_pages()
    blocks = free_blocks(machine)
    assert free_huge_pages(machine) == blocks[HPAGE_PMD_ORDER] + 2 * blocks[HPAGE_PMD_ORDER + 1]
    share = unusable_share(machine)
    assert share == pytest.approx(1 - free_huge_pages(machine) * 512 / free_pages(machine))
