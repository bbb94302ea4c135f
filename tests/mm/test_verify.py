# SPDX-License-Identifier: GPL-2.0-only
"""The checker finds what it is for: each kind of damage, done by hand, is reported."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hostzero.errors import VmBug
from hostzero.mm import MemoryManager, ZoneSpec
from hostzero.mm import verify as module
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.list import list_add, list_del
from hostzero.mm.mmzone import (
    MIGRATE_CMA,
    MIGRATE_ISOLATE,
    MIGRATE_UNMOVABLE,
    PAGEBLOCK_NR_PAGES,
    hugepage_freelist,
)
from hostzero.mm.page_flags import PG_dirty, PG_reported, PG_zeroed, PGTY_buddy, PGTY_offline
from hostzero.mm.snapshot import forget_zero_claims
from hostzero.mm.verify import PROBLEMS, verify_memory
from tests.mm.conftest import Boot
from tests.mm.guest import free_head, free_lists, is_marked_zero, page_bytes, pcp_head, pcp_lists, verify
from tests.mm.processes import MIB

Damage = Callable[[MemoryManager], None]


@pytest.fixture
def mm(boot: Boot) -> MemoryManager:
    """A guest with blocks on free lists, on per-CPU lists and in the balloon, and with owners."""
    mm = boot(4, nr_cpus=2, cma_pages=PAGEBLOCK_NR_PAGES, swap_size=MIB)
    for order in (0, 2, 5):
        mm.alloc_pages(GFP_KERNEL, order)
        for cpu in range(2):
            mm.free_pages(mm.alloc_pages(GFP_HIGHUSER_MOVABLE, order, cpu=cpu), order, cpu=cpu)
    mm.balloon.enqueue(mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 3))
    waiting = [mm.alloc_pages(GFP_KERNEL, 4) for _ in range(2)]
    with mm.zone_lock():
        for pfn in waiting:
            mm.free_pages_nolock(pfn, 4)
    verify(mm)
    return mm


def a_free_block(mm: MemoryManager, order: int = 3) -> int:
    return next(blocks[0] for (_, o, _), blocks in free_lists(mm.mem).items() if o == order)


def a_parked_page(mm: MemoryManager, order: int = 0) -> int:
    return next(
        blocks[0]
        for (_, pindex), blocks in pcp_lists(mm.mem).items()
        if (pindex // 3 if pindex < 12 else 9) == order
    )


def a_balloon_page(mm: MemoryManager) -> int:
    return int(mm.mem.mem_map[int(mm.mem.vm[0].balloon_head)].lru_next)


def a_deferred_block(mm: MemoryManager) -> int:
    return int(mm.mem.mem_map[int(mm.mem.vm[0].trylock_heads)].lru_next)


def an_owned_page(mm: MemoryManager) -> int:
    return int(mm.mem.vm[0].empty_zero_page)


def break_backward_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].lru_prev = 5


def break_forward_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].lru_next = -2


def lead_a_list_outside_of_memory(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].lru_next = 10**9


def break_heads_backward_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[free_head(mm.mem, 0, 0, MIGRATE_ISOLATE)].lru_prev = 5


def break_parked_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_parked_page(mm)].lru_prev = 5


def break_parked_heads_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[pcp_head(mm.mem, 0, 1, 13)].lru_prev = 5


def break_balloon_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_balloon_page(mm)].lru_prev = 5


def break_balloon_heads_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[int(mm.mem.vm[0].balloon_head)].lru_prev = 5


def break_deferred_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_deferred_block(mm)].lru_prev = 5


def break_deferred_heads_link(mm: MemoryManager) -> None:
    mm.mem.mem_map[int(mm.mem.vm[0].trylock_heads)].lru_prev = 5


def defer_a_part_of_a_free_block(mm: MemoryManager) -> None:
    inner = a_free_block(mm, 8) + 1
    list_add(mm.mem, inner, int(mm.mem.vm[0].trylock_heads))


def defer_a_block_of_no_order(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_deferred_block(mm)].private = 11


def leave_a_flag_on_a_deferred_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_deferred_block(mm)].flags_f |= PG_dirty


def write_to_a_deferred_block_that_claims_zero(mm: MemoryManager) -> None:
    pfn = a_deferred_block(mm)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    page_bytes(mm, pfn + 15)[9] = 1


def lose_a_deferred_block(mm: MemoryManager) -> None:
    list_del(mm.mem, a_deferred_block(mm))


def list_a_part_of_a_free_block(mm: MemoryManager) -> None:
    inner = a_free_block(mm, 8) + 4
    mm.mem.mem_map[inner].page_type = PGTY_buddy
    mm.mem.mem_map[inner].private = 2
    list_add(mm.mem, inner, free_head(mm.mem, 0, 2, int(mm.mem.pageblock[inner // PAGEBLOCK_NR_PAGES])))
    mm.mem.zone[0].nr_free[2] += 1


def park_a_part_of_a_free_block(mm: MemoryManager) -> None:
    list_add(mm.mem, a_free_block(mm, 8) + 1, pcp_head(mm.mem, 0, 0, 0))


def put_a_parked_page_into_the_balloon(mm: MemoryManager) -> None:
    """Into the middle of a parked block, so that the list links stay intact."""
    inner = a_parked_page(mm, 2) + 1
    mm.mem.mem_map[inner].lru_next = mm.mem.mem_map[inner].lru_prev = -2
    list_add(mm.mem, inner, int(mm.mem.vm[0].balloon_head))


def lose_a_buddy_type(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].page_type = 0


def park_a_buddy(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_parked_page(mm)].page_type = PGTY_buddy


def change_a_blocks_order(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].private = 2


def list_an_unaligned_block(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL, 4)
    mm.mem.mem_map[pfn + 1].page_type = PGTY_buddy
    mm.mem.mem_map[pfn + 1].private = 3
    list_add(mm.mem, pfn + 1, free_head(mm.mem, 0, 3, MIGRATE_UNMOVABLE))


def change_a_pageblocks_type(mm: MemoryManager) -> None:
    mm.mem.pageblock[:] = MIGRATE_ISOLATE


def move_a_block_to_another_zone(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].zone = 1


def move_a_parked_page_to_another_zone(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_parked_page(mm)].zone = 1


def leave_a_flag_on_a_free_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm)].flags_f |= PG_dirty


def leave_a_mark_inside_a_free_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm) + 1].flags_f |= PG_zeroed


def leave_a_report_inside_a_free_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm) + 4].flags_f |= PG_reported


def leave_a_reference_on_a_parked_page(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_parked_page(mm)]._refcount = 1


def leave_a_mapping_on_a_free_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm) + 7].mapping = 1


def leave_a_free_block_mapped(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm) + 7]._mapcount = 0


def leave_a_tail_in_a_free_block(mm: MemoryManager) -> None:
    mm.mem.compound_head[a_free_block(mm) + 1] = 3


def leave_a_type_inside_a_free_block(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_free_block(mm) + 1].page_type = PGTY_offline


def drop_a_balloon_pages_reference(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_balloon_page(mm)]._refcount = 0


def drop_a_balloon_pages_type(mm: MemoryManager) -> None:
    mm.mem.mem_map[a_balloon_page(mm)].page_type = 0


def miscount_blocks(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free[3] += 1


def miscount_pages(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_pages -= 1


def miscount_cma(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_cma += 1


def miscount_highatomic(mm: MemoryManager) -> None:
    mm.mem.zone[0].nr_free_highatomic += 1


def miscount_parked_pages(mm: MemoryManager) -> None:
    mm.mem.pcp["count"][1] += 1


def write_to_a_free_block_that_claims_zero(mm: MemoryManager) -> None:
    pfn = a_free_block(mm)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    page_bytes(mm, pfn + 7)[4095] = 1


def write_to_a_parked_page_that_claims_zero(mm: MemoryManager) -> None:
    pfn = a_parked_page(mm)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    page_bytes(mm, pfn)[0] = 1


def write_to_a_balloon_page_that_claims_zero(mm: MemoryManager) -> None:
    pfn = a_balloon_page(mm)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    page_bytes(mm, pfn)[77] = 1


def split_a_block_and_leave_it(mm: MemoryManager) -> None:
    pfn = a_free_block(mm)
    list_del(mm.mem, pfn)
    for part in (pfn, pfn + 4):
        mm.mem.mem_map[part].page_type = PGTY_buddy
        mm.mem.mem_map[part].private = 2
        list_add(mm.mem, part, free_head(mm.mem, 0, 2, int(mm.mem.pageblock[pfn // PAGEBLOCK_NR_PAGES])))


def lose_a_free_block(mm: MemoryManager) -> None:
    pfn = a_free_block(mm)
    list_del(mm.mem, pfn)
    mm.mem.zone[0].nr_free[3] -= 1
    mm.mem.zone[0].nr_free_pages -= 8


def claim_zero_without_an_owner(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.mem.mem_map[pfn]._refcount = 0
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed


def lose_a_balloon_page(mm: MemoryManager) -> None:
    list_del(mm.mem, a_balloon_page(mm))


def put_a_page_into_a_pool_of_huge_pages(mm: MemoryManager) -> None:
    list_add(mm.mem, mm.alloc_pages(GFP_KERNEL), hugepage_freelist(mm.mem, 0, 0))


def miscount_huge_pages(mm: MemoryManager) -> None:
    mm.mem.hstate[0].nr_huge_pages += 1


def miscount_a_cgroup(mm: MemoryManager) -> None:
    mm.mem.memcg[mm.memcg.create(None)].usage = 1


def charge_a_page_behind_its_cgroups_back(mm: MemoryManager) -> None:
    memcg = mm.memcg.create(None, parent=mm.memcg.create(None))
    mm.mem.mem_map[mm.alloc_pages(GFP_KERNEL)].memcg_data = memcg + 1


def charge_a_page_to_a_cgroup_that_is_gone(mm: MemoryManager) -> None:
    mm.mem.mem_map[mm.alloc_pages(GFP_KERNEL)].memcg_data = 5


def lose_a_swap_slot(mm: MemoryManager) -> None:
    mm.mem.swap_map[7] = 1


DAMAGE: list[tuple[Damage, int]] = [
    (break_backward_link, module.BAD_LINKS),
    (break_forward_link, module.BAD_LINKS),
    (lead_a_list_outside_of_memory, module.BAD_LINKS),
    (break_heads_backward_link, module.BAD_LINKS),
    (break_parked_link, module.BAD_LINKS),
    (break_parked_heads_link, module.BAD_LINKS),
    (break_balloon_link, module.BAD_LINKS),
    (break_balloon_heads_link, module.BAD_LINKS),
    (break_deferred_link, module.BAD_LINKS),
    (break_deferred_heads_link, module.BAD_LINKS),
    (defer_a_part_of_a_free_block, module.LISTED_TWICE),
    (defer_a_block_of_no_order, module.BAD_BLOCK),
    (leave_a_flag_on_a_deferred_block, module.STILL_OWNED),
    (write_to_a_deferred_block_that_claims_zero, module.FALSE_ZERO),
    (lose_a_deferred_block, module.BAD_DEFERRED_COUNT),
    (list_a_part_of_a_free_block, module.LISTED_TWICE),
    (park_a_part_of_a_free_block, module.LISTED_TWICE),
    (put_a_parked_page_into_the_balloon, module.LISTED_TWICE),
    (lose_a_buddy_type, module.BAD_BLOCK),
    (park_a_buddy, module.BAD_BLOCK),
    (change_a_blocks_order, module.BAD_BLOCK),
    (list_an_unaligned_block, module.BAD_BLOCK),
    (change_a_pageblocks_type, module.WRONG_LIST),
    (move_a_block_to_another_zone, module.WRONG_LIST),
    (move_a_parked_page_to_another_zone, module.WRONG_LIST),
    (leave_a_flag_on_a_free_block, module.STILL_OWNED),
    (leave_a_mark_inside_a_free_block, module.STILL_OWNED),
    (leave_a_report_inside_a_free_block, module.STILL_OWNED),
    (leave_a_reference_on_a_parked_page, module.STILL_OWNED),
    (leave_a_mapping_on_a_free_block, module.STILL_OWNED),
    (leave_a_free_block_mapped, module.STILL_OWNED),
    (leave_a_tail_in_a_free_block, module.STILL_OWNED),
    (leave_a_type_inside_a_free_block, module.STILL_OWNED),
    (drop_a_balloon_pages_reference, module.STILL_OWNED),
    (drop_a_balloon_pages_type, module.STILL_OWNED),
    (miscount_blocks, module.BAD_NR_FREE),
    (miscount_pages, module.BAD_FREE_PAGES),
    (miscount_cma, module.BAD_FREE_PAGES),
    (miscount_highatomic, module.BAD_FREE_PAGES),
    (miscount_parked_pages, module.BAD_PCP_COUNT),
    (write_to_a_free_block_that_claims_zero, module.FALSE_ZERO),
    (write_to_a_parked_page_that_claims_zero, module.FALSE_ZERO),
    (write_to_a_balloon_page_that_claims_zero, module.FALSE_ZERO),
    (split_a_block_and_leave_it, module.UNMERGED),
    (lose_a_free_block, module.UNLISTED),
    (claim_zero_without_an_owner, module.UNLISTED),
    (lose_a_balloon_page, module.BAD_BALLOON_COUNT),
    (put_a_page_into_a_pool_of_huge_pages, module.BAD_HUGE_PAGE),
    (miscount_huge_pages, module.BAD_HUGE_COUNT),
    (miscount_a_cgroup, module.BAD_CHARGE),
    (charge_a_page_behind_its_cgroups_back, module.BAD_CHARGE),
    (charge_a_page_to_a_cgroup_that_is_gone, module.BAD_CHARGE),
    (lose_a_swap_slot, module.BAD_SWAP_COUNT),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_reported_as_what_it_is(mm: MemoryManager, damage: Damage, problem: int) -> None:
    damage(mm)
    with pytest.raises(VmBug) as caught:
        verify_memory(mm.mem)
    text = str(caught.value)
    assert text.startswith(PROBLEMS[problem])
    about_a_counter = problem in {
        module.BAD_NR_FREE,
        module.BAD_FREE_PAGES,
        module.BAD_PCP_COUNT,
        module.BAD_BALLOON_COUNT,
        module.BAD_HUGE_COUNT,
        module.BAD_CHARGE,
        module.BAD_SWAP_COUNT,
        module.BAD_DEFERRED_COUNT,
    }
    assert (": pfn " not in text) == about_a_counter


def test_every_problem_has_a_test_and_a_text() -> None:
    numbers = {value for name, value in vars(module).items() if name.startswith("BAD_")} | {
        module.LISTED_TWICE,
        module.WRONG_LIST,
        module.STILL_OWNED,
        module.FALSE_ZERO,
        module.UNMERGED,
        module.UNLISTED,
    }
    assert numbers == set(PROBLEMS) == {problem for _, problem in DAMAGE}
    assert len(set(PROBLEMS.values())) == len(PROBLEMS)
    assert module.NO_PROBLEM not in PROBLEMS


def test_a_block_may_not_hide_a_pageblock_of_another_type(boot: Boot) -> None:
    """On a movable list, with CMA in its second half: it would be handed to anybody."""
    mm = boot(12)
    (pfn,) = free_lists(mm.mem)[0, 10, 1][:1]
    mm.mem.pageblock[pfn // PAGEBLOCK_NR_PAGES + 1] = MIGRATE_CMA
    with pytest.raises(VmBug, match=PROBLEMS[module.WRONG_LIST]):
        verify_memory(mm.mem)


def test_a_block_must_end_where_memory_does(boot: Boot) -> None:
    """Aligned to order 10, but there are only 512 pages from there on."""
    mm = boot(6)
    pfn = 1024
    for (_, order, migratetype), blocks in free_lists(mm.mem).items():
        if order == 9 and pfn in blocks:
            list_del(mm.mem, pfn)
            list_add(mm.mem, pfn, free_head(mm.mem, 0, 10, migratetype))
            mm.mem.zone[0].nr_free[9] -= 1
    mm.mem.mem_map[pfn].private = 10
    with pytest.raises(VmBug, match=PROBLEMS[module.BAD_BLOCK]):
        verify_memory(mm.mem)


def test_a_false_claim_is_found_only_if_the_bytes_are_read(mm: MemoryManager) -> None:
    write_to_a_free_block_that_claims_zero(mm)
    verify_memory(mm.mem, contents=False)
    with pytest.raises(VmBug):
        verify_memory(mm.mem)


@pytest.mark.parametrize("order", range(1, 9))
def test_every_byte_of_a_claim_is_read(boot: Boot, order: int) -> None:
    mm = boot(4)
    pfn = a_free_block(mm, order)
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed
    verify(mm)
    for offset in (0, -1):
        page_bytes(mm, pfn, 1 << order)[offset] = 1
        with pytest.raises(VmBug, match=PROBLEMS[module.FALSE_ZERO]):
            verify(mm)
        page_bytes(mm, pfn, 1 << order)[offset] = 0


def test_reported_and_zero_marks_on_a_free_block_are_no_problem(mm: MemoryManager) -> None:
    pfn = a_free_block(mm)
    page_bytes(mm, pfn, 8)[:] = 0
    mm.mem.mem_map[pfn].flags_f |= PG_zeroed | PG_reported
    verify(mm)


def test_an_owner_may_use_private_for_itself(mm: MemoryManager) -> None:
    mm.mem.mem_map[an_owned_page(mm)].flags_f |= PG_zeroed
    page_bytes(mm, an_owned_page(mm))[:] = 1
    verify(mm)


def test_free_neighbours_in_different_zones_are_no_problem(boot: Boot) -> None:
    verify(boot(8, zones=(ZoneSpec("DMA32", 0, 1536), ZoneSpec("Normal", 1536, 2048))))


def test_all_claims_can_be_forgotten(mm: MemoryManager) -> None:
    """Free, parked, deferred and in the balloon; what owners do with PG_private is theirs."""
    claims = [a_free_block(mm), a_free_block(mm, 5), a_parked_page(mm), a_balloon_page(mm)]
    claims.append(a_deferred_block(mm))
    mm.mem.mem_map.flags_f[[*claims, an_owned_page(mm)]] |= PG_zeroed
    assert forget_zero_claims(mm.mem) == len(claims)
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in claims)
    assert is_marked_zero(mm.mem, an_owned_page(mm))
    assert forget_zero_claims(mm.mem) == 0
    mm.ram_bytes[:] = np.uint8(1)
    verify(mm)
