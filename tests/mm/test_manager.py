# SPDX-License-Identifier: GPL-2.0-only
"""`MemoryManager`: configuration, out of memory, counters, and clear errors for bad input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hostzero.clock import Clock
from hostzero.errors import OutOfMemory, UsageError, VmBug
from hostzero.mm import MemoryManager, MmConfig, ZoneSpec
from hostzero.mm.gfp import (
    __GFP_RECLAIMABLE,
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_KERNEL,
    GFP_MOVABLE_MASK,
    GFP_NORETRY,
    GFP_RETRY_MAYFAIL,
    GFP_THISNODE,
    GFP_ZERO,
)
from hostzero.mm.page_flags import PG_reserved
from hostzero.ram import open_ram
from hostzero.units import PAGE_SIZE, Pfn
from tests.mm.conftest import Boot
from tests.mm.guest import dirty, is_marked_zero, page_bytes, reads_zero, verify


@pytest.fixture
def full(boot: Boot) -> MemoryManager:
    """A guest with nothing left that an ordinary request may have."""
    mm = boot(4)
    mm.mem.zone[0].watermark_min = mm.mem.zone[0].watermark_low = 100_000
    mm.drain_all_pages()
    return mm


# ---- configuration


@pytest.mark.parametrize(
    ("config", "on_alloc", "on_free"),
    [
        (MmConfig(), False, False),
        (MmConfig(init_on_alloc=True, init_on_free=True), True, True),
        (MmConfig(init_on_alloc=True, init_on_free=True, page_poisoning=True), False, False),
    ],
)
def test_poisoning_excludes_and_beats_initialisation(config: MmConfig, on_alloc: bool, on_free: bool) -> None:
    assert (config.want_init_on_alloc, config.want_init_on_free) == (on_alloc, on_free)


@pytest.mark.parametrize("thp", ["always", "madvise", "never"])
@pytest.mark.parametrize("on", [True, False])
def test_the_configuration_reaches_the_record(boot: Boot, thp: str, on: bool) -> None:
    vm = boot(4, thp=thp, debug_vm=on, init_on_alloc=on, init_on_free=on).mem.vm[0]
    assert (int(vm.thp_always), int(vm.thp_never)) == (int(thp == "always"), int(thp == "never"))
    assert [int(vm.debug_vm), int(vm.init_on_alloc), int(vm.init_on_free)] == [int(on)] * 3
    assert int(vm.page_poisoning) == 0


@pytest.mark.parametrize(
    ("mib", "config", "text"),
    [
        (2, {}, "a guest needs at least 4 MiB, not 2 MiB"),
        (4, {"nr_cpus": 0}, "a guest needs at least one CPU, not 0"),
        (4, {"zones": (ZoneSpec("A", 0, 500), ZoneSpec("B", 500, 1024))}, "zone B must start at page 500"),
        (4, {"zones": (ZoneSpec("A", 0, 512), ZoneSpec("B", 1024, 2048))}, "zone B must start at page 512"),
        (4, {"zones": (ZoneSpec("A", 0, 0),)}, "zone A must start at page 0, .* and not be empty"),
        (4, {"zones": (ZoneSpec("A", 0, 512),)}, "the zones end at page 512, but the guest has 1024"),
        (4, {"cma_pages": 100}, "100 CMA pages are not whole pageblocks inside zone DMA32"),
        (4, {"cma_pages": -512}, "-512 CMA pages"),
        (4, {"cma_pages": 1024}, "1024 CMA pages"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    boot: Boot, mib: int, config: dict[str, object], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        boot(mib, **config)


def test_the_clock_can_come_from_outside() -> None:
    clock = Clock()
    with open_ram(4 << 20) as ram:
        assert MemoryManager(ram, clock=clock).clock is clock
        assert MemoryManager(ram).config == MmConfig()


def test_the_firmwares_page_is_never_free(mm: MemoryManager) -> None:
    assert int(mm.mem.mem_map[0].flags_f) == PG_reserved
    assert mm.vm_stats().total_pages == mm.nr_pages - 1


def test_the_zero_page_is_zero_although_the_ram_was_used_before() -> None:
    with open_ram(4 << 20) as ram:
        ram.buffer[:] = b"\x5a" * ram.size
        mm = MemoryManager(ram)
        assert reads_zero(mm, int(mm.mem.vm[0].empty_zero_page))
        assert not reads_zero(mm, 1000)
        verify(mm)


@pytest.mark.parametrize(
    ("config", "byte"), [({"page_poisoning": True}, 0xAA), ({"init_on_free": True}, 0), ({}, 0x5A)]
)
def test_free_memory_is_written_at_boot_as_it_would_be_on_free(config: dict[str, bool], byte: int) -> None:
    with open_ram(4 << 20) as ram:
        ram.buffer[:] = b"\x5a" * ram.size
        mm = MemoryManager(ram, MmConfig(**config))  # type: ignore[arg-type]
        assert (page_bytes(mm, 100, 300) == byte).all()
        assert mm.vm_stats().poison_errors == 0
        mm.alloc_pages(GFP_KERNEL, 4)
        assert mm.vm_stats().poison_errors == 0


# ---- bad input


@pytest.mark.parametrize("order", [-1, 11, 100])
def test_an_order_that_does_not_exist_is_refused(mm: MemoryManager, order: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mm.alloc_pages(GFP_KERNEL, order),
        lambda: mm.alloc_pages_bulk(GFP_KERNEL, 3, order=order),
        lambda: mm.free_pages(Pfn(5), order),
        lambda: mm.free_pages_bulk(np.array([5]), order),
        lambda: mm.free_frozen_pages_zeroed(Pfn(5), order),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"order {order} is not between 0 and 10"):
            call()


@pytest.mark.parametrize("pfn", [-1, 2048, 1 << 40])
def test_a_page_that_does_not_exist_is_refused(mm: MemoryManager, pfn: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mm.free_pages(Pfn(pfn)),
        lambda: mm.free_pages_bulk(np.array([5, pfn, 6])),
        lambda: mm.put_page_zeroed(Pfn(pfn)),
        lambda: mm.free_frozen_pages_zeroed(Pfn(pfn)),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"there is no page {pfn:#x} of order 0: the guest has 0x800"):
            call()


def test_a_block_must_end_inside_of_memory(mm: MemoryManager) -> None:
    with pytest.raises(UsageError, match="there is no page 0x7fc of order 3"):
        mm.free_pages(Pfn(2044), 3)


@pytest.mark.parametrize("cpu", [-1, 1])
def test_a_cpu_that_does_not_exist_is_refused(mm: MemoryManager, cpu: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mm.spawn(cpu=cpu),
        lambda: mm.alloc_pages(GFP_KERNEL, cpu=cpu),
        lambda: mm.alloc_pages_bulk(GFP_KERNEL, 3, cpu=cpu),
        lambda: mm.free_pages(Pfn(5), cpu=cpu),
        lambda: mm.free_pages_bulk(np.array([5]), cpu=cpu),
        lambda: mm.put_page_zeroed(Pfn(5), cpu=cpu),
        lambda: mm.free_frozen_pages_zeroed(Pfn(5), cpu=cpu),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"there is no CPU {cpu}: the guest has 1"):
            call()


@pytest.mark.parametrize("node", [-1, 1])
def test_a_node_that_does_not_exist_is_refused(mm: MemoryManager, node: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: mm.spawn(node=node),
        lambda: mm.alloc_pages(GFP_KERNEL, node=node),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"there is no node {node}: the guest has 1"):
            call()


def test_a_request_is_movable_or_reclaimable_but_not_both(mm: MemoryManager) -> None:
    for call in (lambda gfp: mm.alloc_pages(gfp), lambda gfp: mm.alloc_pages_bulk(gfp, 2)):
        with pytest.raises(UsageError, match="asks for movable and reclaimable pages at once"):
            call(GFP_HIGHUSER_MOVABLE | __GFP_RECLAIMABLE)


def test_nothing_to_free_is_nothing(mm: MemoryManager) -> None:
    mm.free_pages_bulk(np.array([], dtype=np.int64))
    verify(mm)


def test_each_process_has_an_address_space_of_its_own(mm: MemoryManager) -> None:
    assert mm.spawn() is not mm.spawn()


def test_a_failed_assertion_says_which_page_it_was_about(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL)
    mm.free_pages(pfn)
    with pytest.raises(VmBug, match=f"the page has no reference: pfn {pfn:#x} flags 0x0 .* refcount 0 "):
        mm.free_pages(pfn)


# ---- out of memory


def test_an_oom_notifier_is_asked_until_it_has_nothing_left(full: MemoryManager) -> None:
    calls: list[int] = []

    def notifier() -> int:
        calls.append(1)
        if len(calls) == 2:
            full.mem.zone[0].watermark_min = 0
        return 1 if len(calls) < 3 else 0

    full.register_oom_notifier(notifier)
    assert full.alloc_pages(GFP_KERNEL) > 0
    assert len(calls) == 2
    assert full.vm_stats().oom_kill == 0


def test_out_of_memory_is_an_error_after_the_notifiers(full: MemoryManager) -> None:
    calls: list[int] = []
    for _ in range(2):
        full.register_oom_notifier(lambda: calls.append(1) or 0)  # type: ignore[func-returns-value]
    with pytest.raises(OutOfMemory, match="no free block of order 2"):
        full.alloc_pages(GFP_KERNEL, 2)
    assert len(calls) == 2
    assert full.vm_stats().oom_kill == 1


@pytest.mark.parametrize(
    ("gfp", "order"),
    [
        (GFP_ATOMIC, 0),
        (GFP_KERNEL, 4),
        (GFP_KERNEL | GFP_NORETRY, 0),
        (GFP_HIGHUSER_MOVABLE | GFP_RETRY_MAYFAIL, 0),
        (GFP_KERNEL | GFP_THISNODE, 0),
    ],
)
def test_requests_that_may_fail_do_not_disturb_anybody(full: MemoryManager, gfp: int, order: int) -> None:
    """`__alloc_pages_may_oom`: above all, a balloon that inflates must not deflate itself."""
    full.mem.zone[0].nr_free_pages = 0  # GFP_ATOMIC may use most of any reserve

    def notifier() -> int:
        raise AssertionError("the OOM notifiers were called")

    full.register_oom_notifier(notifier)
    with pytest.raises(OutOfMemory):
        full.alloc_pages(gfp, order)
    assert full.vm_stats().oom_kill == 0


def test_an_oom_notifier_can_be_taken_off(full: MemoryManager) -> None:
    calls: list[int] = []
    unregister = full.register_oom_notifier(lambda: calls.append(1) or 0)  # type: ignore[func-returns-value]
    unregister()
    with pytest.raises(OutOfMemory):
        full.alloc_pages(GFP_KERNEL)
    assert calls == []


# ---- pages


def test_bulk_allocation_is_shorter_when_memory_ends(boot: Boot) -> None:
    mm = boot(4)
    pfns = mm.alloc_pages_bulk(GFP_KERNEL, 2000)
    assert 0 < len(pfns) < 1024
    mm.free_pages_bulk(pfns)
    mm.drain_all_pages()
    verify(mm)


@pytest.mark.parametrize("order", [0, 3])
def test_bulk_allocation_zeroes_each_block(mm: MemoryManager, order: int) -> None:
    mm.ram_bytes[4096:] = 0x5A
    pfns = mm.alloc_pages_bulk(GFP_KERNEL | GFP_ZERO, 5, order=order)
    assert all(reads_zero(mm, int(pfn), order) for pfn in pfns)
    mm.free_pages_bulk(pfns, order)
    verify(mm)


def test_a_folio_is_put_as_zero_under_both_names(mm: MemoryManager) -> None:
    for put in (mm.put_page_zeroed, mm.folio_put_zeroed):
        pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
        assert put(pfn)
        assert is_marked_zero(mm.mem, pfn)


def test_a_restored_guest_believes_no_claim_from_before(mm: MemoryManager) -> None:
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
    mm.put_page_zeroed(pfn)
    dirty(mm, pfn)  # what the image did not keep
    assert mm.forget_zero_claims() == 1
    assert mm.alloc_pages(GFP_KERNEL | GFP_ZERO) == pfn
    assert reads_zero(mm, pfn)
    verify(mm)


# ---- counters


def test_statistics_count_parked_pages_as_free(mm: MemoryManager) -> None:
    before = mm.vm_stats()
    assert before.total_pages == mm.nr_pages - 1
    assert before.free_pages == before.total_pages - 1  # the zero page
    assert before.available_pages == before.free_pages - int(mm.mem.zone[0].watermark_low)
    pfn = mm.alloc_pages(GFP_KERNEL, 3)
    assert mm.vm_stats().free_pages == before.free_pages - 8
    mm.free_pages(pfn, 3)
    assert mm.vm_stats().free_pages == before.free_pages
    after = mm.vm_stats()
    assert (after.pgalloc - before.pgalloc, after.pgfree - before.pgfree) == (8, 8)


def test_available_pages_are_never_negative(full: MemoryManager) -> None:
    assert full.vm_stats().available_pages == 0


def test_bytes_are_counted_by_what_became_of_the_zeroing(mm: MemoryManager) -> None:
    before = mm.vm_stats()
    pfn = mm.alloc_pages(GFP_KERNEL | GFP_ZERO)
    mm.put_page_zeroed(pfn)
    assert mm.alloc_pages(GFP_KERNEL | GFP_ZERO) == pfn
    mm.put_page_zeroed(pfn)
    assert mm.alloc_pages(GFP_KERNEL) == pfn
    after = mm.vm_stats()
    assert after.zeroed_bytes - before.zeroed_bytes == PAGE_SIZE
    assert after.known_zero_bytes - before.known_zero_bytes == PAGE_SIZE
    assert after.dropped_hint_bytes - before.dropped_hint_bytes == PAGE_SIZE


def test_managed_pages_and_watermarks_follow_the_balloon(boot: Boot) -> None:
    mm = boot(8, zones=(ZoneSpec("DMA32", 0, 512), ZoneSpec("Normal", 512, 2048)))
    before = mm.mem.zone.managed_pages.tolist()
    low = mm.mem.zone.watermark_low.tolist()
    mm.adjust_managed_page_count(-1000)
    assert mm.mem.zone.managed_pages.tolist() == [before[0], before[1] - 1000]
    assert mm.mem.zone.watermark_low.tolist() == low
    mm.setup_per_zone_wmarks()
    assert mm.mem.zone.watermark_low[1] < low[1]


def test_every_counter_of_the_record_is_reported_under_its_name(mm: MemoryManager) -> None:
    names = [
        *(
            "pgalloc",
            "pgfree",
            "pgfault",
            "thp_fault_alloc",
            "thp_fault_fallback",
            "allocstall",
            "alloc_fail",
        ),
        *("fallback_claims", "fallback_steals", "zeroed_bytes", "known_zero_bytes", "dropped_hint_bytes"),
    ]
    for number, name in enumerate(names, start=1):
        mm.mem.vm[0][name] = number
    mm.mem.vm[0].nr_balloon_pages, mm.mem.vm[0].nr_bad_pages, mm.mem.vm[0].nr_poison_errors = 100, 101, 102
    stats = mm.vm_stats()
    assert [getattr(stats, name) for name in names] == list(range(1, len(names) + 1))
    assert (stats.balloon_pages, stats.bad_pages, stats.poison_errors) == (100, 101, 102)
    assert all(type(value) is int for value in vars(stats).values())
    assert isinstance(mm.ram_bytes, np.ndarray)


@pytest.mark.parametrize(
    "request_",
    [
        lambda mm: mm.alloc_pages(GFP_KERNEL, cpu=1),
        lambda mm: mm.alloc_pages(GFP_KERNEL, cpu=-1),
        lambda mm: mm.alloc_pages(GFP_KERNEL, node=1),
        lambda mm: mm.alloc_pages_bulk(GFP_KERNEL, 4, cpu=1),
        lambda mm: mm.alloc_pages(GFP_KERNEL | GFP_MOVABLE_MASK),
        lambda mm: mm.free_pages(Pfn(1), 11),
        lambda mm: mm.free_pages(Pfn(mm.nr_pages - 1), 1),
        lambda mm: mm.spawn(node=1),
    ],
    ids=["cpu", "negative cpu", "node", "bulk cpu", "both mobilities", "order", "past the end", "spawn node"],
)
def test_a_request_that_compiled_code_could_not_index_is_refused(
    request_: Callable[[MemoryManager], object],
) -> None:
    with open_ram(8 << 20) as ram:
        mm = MemoryManager(ram)
        before = mm.vm_stats()
        with pytest.raises(UsageError):
            request_(mm)
        assert mm.vm_stats() == before
        del mm
