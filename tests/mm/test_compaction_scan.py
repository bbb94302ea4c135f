# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from typing import Any

import pytest

from hostzero.mm import MemoryManager, Process, compaction_scan
from hostzero.mm.compaction import compact_zone_begin, compact_zone_end
from hostzero.mm.compaction_scan import (
    MIGRATE_ASYNC,
    MIGRATE_SYNC,
    compaction_alloc,
    compaction_free,
    isolate_freepages,
    isolate_migratepages,
)
from hostzero.mm.fallback import __move_freepages_block
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_KERNEL
from hostzero.mm.mmzone import (
    COMPACT_CLUSTER_MAX,
    MIGRATE_MOVABLE,
    MIGRATE_UNMOVABLE,
    NO_PAGE,
    compact_freepages,
    compact_migratepages,
    compact_movable_ops,
)
from hostzero.mm.page_flags import PG_head, PG_private
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import free_lists, is_marked_zero, page_bytes, reads_zero, walk
from tests.mm.migration import check, scatter
from tests.mm.processes import free_pages, occupy, pages, pfn_at


def begin(mm: MemoryManager, order: int = -1, *, mode: int = MIGRATE_SYNC, balloon: bool = False) -> None:
    mm.drain_all_pages()
    compact_zone_begin(mm.mem, 0, order, MIGRATE_MOVABLE, mode, balloon, 0)


def end(mm: MemoryManager) -> None:
    compact_zone_end(mm.mem)
    mm.drain_all_pages()
    check(mm)


def isolated(mm: MemoryManager) -> list[int]:
    return walk(mm.mem, int(compact_migratepages(mm.mem)))


@pytest.fixture
def small(boot: Boot) -> tuple[MemoryManager, Process, dict[int, bytes]]:
    """A guest with small pages only, of which a process has every tenth of the first 800 or so."""
    mm = boot(thp="never")
    process = mm.spawn()
    _, held = scatter(process, 800, 80)
    return mm, process, held


Small = tuple[MemoryManager, Process, dict[int, bytes]]


def test_folios_are_isolated_from_the_start_of_the_zone_in_clusters(small: Small) -> None:
    mm, process, held = small
    lowest = sorted(pfn for addr in held if (pfn := pfn_at(mm, process, addr)))
    begin(mm)
    assert isolate_migratepages(mm.mem) == COMPACT_CLUSTER_MAX
    assert isolated(mm) == lowest[:COMPACT_CLUSTER_MAX]
    assert mm.mem.cc[0].migrate_pfn == lowest[COMPACT_CLUSTER_MAX - 1] + 1
    end(mm)
    assert (mm.mem.mem_map[lowest]._refcount == 1).all()


def held_blocks(mm: MemoryManager) -> list[tuple[int, int]]:
    return [
        (order, pfn) for order in range(11) for pfn in walk(mm.mem, int(compact_freepages(mm.mem, order)))
    ]


def test_free_blocks_are_isolated_from_the_end_of_the_zone(small: Small) -> None:
    """As many as there are folios to move; what is free as a whole pageblock is no target."""
    mm, _, _ = small
    begin(mm)
    whole = {pfn // 512 for pfn in range(0, mm.nr_pages, 512) if int(mm.mem.mem_map[pfn].private) >= 9}
    isolate_migratepages(mm.mem)
    isolate_freepages(mm.mem)
    taken = held_blocks(mm)
    last = max(taken)[0]
    total = sum(1 << order for order, _ in taken)
    assert total == mm.mem.cc[0].nr_freepages
    assert COMPACT_CLUSTER_MAX <= total < COMPACT_CLUSTER_MAX + (1 << last)
    assert min(pfn for _, pfn in taken) > max(isolated(mm))
    assert all(mm.mem.mem_map[pfn].private == order for order, pfn in taken)
    assert whole
    assert not {pfn // 512 for _, pfn in taken} & whole
    end(mm)


def zeroed_free_memory(mm: MemoryManager) -> None:
    """Make every free page known to be zero, as after a report of all memory."""
    taken = occupy(mm)
    for pfn in taken:
        page_bytes(mm, pfn)[:] = 0
    for pfn in taken:
        mm.put_page_zeroed(Pfn(pfn))
    mm.drain_all_pages()


def test_a_target_carries_no_zero_hint(small: Small) -> None:
    """Mutant 11: kept at isolation, the hint would be the new owner's PG_private."""
    mm, _, _ = small
    zeroed_free_memory(mm)
    assert all(is_marked_zero(mm.mem, pfn) for blocks in free_lists(mm.mem).values() for pfn in blocks)
    begin(mm)
    isolate_migratepages(mm.mem)
    isolate_freepages(mm.mem)
    held = [pfn for order in range(11) for pfn in walk(mm.mem, int(compact_freepages(mm.mem, order)))]
    assert held
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in held)
    new = int(compaction_alloc(mm.mem, 0))
    assert int(mm.mem.mem_map[new].flags_f) & PG_private == 0
    compaction_free(mm.mem, new, 0)
    end(mm)
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in held), "what was isolated is known no more"


def test_a_target_is_zeroed_like_every_page_of_a_guest_that_wants_that(boot: Boot) -> None:
    """init_on_alloc: the hook is told that nothing is known, so a page known to be zero is zeroed again."""
    mm = boot(thp="never", init_on_alloc=True)
    scatter(mm.spawn(), 600, 40)
    zeroed_free_memory(mm)
    begin(mm)
    isolate_migratepages(mm.mem)
    isolate_freepages(mm.mem)
    before = mm.vm_stats()
    new = int(compaction_alloc(mm.mem, 0))
    after = mm.vm_stats()
    assert after.zeroed_bytes == before.zeroed_bytes + PAGE_SIZE
    assert after.known_zero_bytes == before.known_zero_bytes
    assert reads_zero(mm, new)
    compaction_free(mm.mem, new, 0)
    end(mm)


def test_a_large_target_is_compound_before_the_hook_sees_it(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch 11: zeroing by folio takes the size from the metadata."""
    mm, _, _ = small
    seen: list[tuple[int, int, bool, int]] = []

    def spy(mem: Any, pfn: int, order: int, gfp: int, user_addr: int, zeroed: bool) -> None:
        head = bool(int(mem.mem_map[pfn].flags_f) & PG_head) and int(mem.mem_map[pfn].order) == order
        tails = sum(int(link) == pfn << 1 | 1 for link in mem.compound_head[pfn + 1 : pfn + (1 << order)])
        seen.append((order, user_addr, head, tails))
        assert not zeroed

    begin(mm)
    isolate_migratepages(mm.mem)
    isolate_freepages(mm.mem)
    with monkeypatch.context() as patch:
        patch.setattr(compaction_scan, "post_alloc_hook", spy)
        # Compiled code has its callees built in; the Python form of the same function looks them up.
        new = getattr(compaction_alloc, "py_func", compaction_alloc)(mm.mem, 2)
    assert seen == [(2, -1, True, 3)]
    compaction_free(mm.mem, new, 2)
    end(mm)


def test_a_block_larger_than_needed_is_split_and_the_rest_kept(small: Small) -> None:
    mm, _, _ = small
    begin(mm)
    isolate_migratepages(mm.mem)
    isolate_freepages(mm.mem)
    order, block = max(held_blocks(mm))
    before = int(mm.mem.cc[0].nr_freepages)
    new = int(compaction_alloc(mm.mem, order - 1))
    assert (order - 1, block + (1 << order - 1)) in held_blocks(mm) or new != block
    got = [(order - 1, new)]
    while len(got) < 3 and (pfn := int(compaction_alloc(mm.mem, 0))) != NO_PAGE:
        got.append((0, pfn))
    everything = [page for o, pfn in [*got, *held_blocks(mm)] for page in range(pfn, pfn + (1 << o))]
    assert len(everything) == len(set(everything)) >= before
    assert mm.mem.cc[0].nr_freepages == sum(1 << o for o, _ in held_blocks(mm))
    for o, pfn in got:
        compaction_free(mm.mem, pfn, o)
    end(mm)


def test_nothing_is_isolated_below_the_minimum_watermark(small: Small) -> None:
    mm, _, _ = small
    begin(mm)
    isolate_migratepages(mm.mem)
    mm.mem.zone[0].watermark_min = mm.mem.zone[0].nr_free_pages
    free = free_pages(mm)
    assert compaction_alloc(mm.mem, 0) == NO_PAGE
    assert free_pages(mm) == free
    end(mm)


def test_asynchronous_compaction_keeps_to_blocks_of_its_type(boot: Boot) -> None:
    mm = boot(thp="never")
    scatter(mm.spawn(), 700, 70)
    mm.drain_all_pages()
    __move_freepages_block(mm.mem, 0, 512, MIGRATE_MOVABLE, MIGRATE_UNMOVABLE)
    mm.mem.pageblock[1] = MIGRATE_UNMOVABLE
    begin(mm, 9, mode=MIGRATE_ASYNC)
    while mm.mem.cc[0].migrate_pfn < 1024:
        mm.mem.cc[0].nr_migratepages = 0
        if not isolate_migratepages(mm.mem):
            break
    blocks = {pfn // 512 for pfn in isolated(mm)}
    end(mm)
    assert blocks == {0}


def test_balloon_pages_are_isolated_only_if_someone_can_tell_the_host(boot: Boot) -> None:
    mm = boot(thp="never")
    taken = pages(*(int(pfn) for pfn in mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 6)))
    mm.balloon.enqueue(taken)
    for registered, wanted in ((False, True), (True, False)):
        unregister = mm.balloon.register_migratepage(lambda new, old: False) if registered else None
        begin(mm, balloon=wanted)
        isolate_migratepages(mm.mem)
        assert walk(mm.mem, int(compact_movable_ops(mm.mem))) == []
        end(mm)
        if unregister:
            unregister()
    mm.balloon.register_migratepage(lambda new, old: False)
    begin(mm, balloon=True)
    assert isolate_migratepages(mm.mem) == 6
    assert sorted(walk(mm.mem, int(compact_movable_ops(mm.mem)))) == sorted(taken.tolist())
    assert mm.balloon.count == 0
    end(mm)
    assert mm.balloon.count == 6


def test_huge_folios_stay_and_kernel_pages_too(boot: Boot) -> None:
    """Compaction makes no blocks larger than a pageblock, so moving one gains nothing."""
    mm = boot(16)
    process = mm.spawn()
    addr = process.mmap(2 << 20)
    process.touch(addr, 2 << 20)
    mm.alloc_pages(GFP_KERNEL, 3)
    begin(mm)
    assert isolate_migratepages(mm.mem) == 0
    end(mm)
