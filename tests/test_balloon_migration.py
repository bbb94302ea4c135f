# SPDX-License-Identifier: GPL-2.0-only
"""Balloon pages that move while they are inside the balloon: real driver, real device, real bytes.

What is asked each time: the balloon is as large as before, the host has discarded the new
pages and no others, and every page that is handed out as zero is zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hostzero import Machine
from hostzero.device import DeviceConfig
from hostzero.driver import State
from hostzero.driver.inflate import Inflation
from hostzero.errors import DriverError
from hostzero.mm import MmConfig
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO
from hostzero.mm.migrate import isolate_migratepages_range, migrate_pages
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_alloc import alloc_pages
from hostzero.units import PAGE_SIZE, Pfn
from hostzero.virtio.features import Feature
from tests.mm.guest import is_marked_zero, page_bytes, reads_zero, walk
from tests.mm.migration import check, holds, scatter, target

MIB = 1 << 20
SIZE = 8 * MIB
BALLOON = 200
BIT7 = Feature.DEVICE_INIT_ON_INFLATE
# Without reporting everything known comes from the bitmap; without DEFLATE_ON_OOM the guest keeps its word.
FEATURES = Feature.VERSION_1 | Feature.STATS_VQ | BIT7
DIRT = 0x5A


def machine_of(features: Feature = FEATURES) -> Machine:
    """Return a small machine whose free memory is dirty."""
    machine = Machine(SIZE, device=DeviceConfig(features=features), mm=MmConfig(thp="never"))
    for pfn in machine.mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE, 1500).tolist():
        page_bytes(machine.mm, pfn)[:] = DIRT
        machine.mm.free_pages(Pfn(pfn))
    machine.mm.drain_all_pages()
    return machine


@pytest.fixture(params=[True, False], ids=["bit-7", "no-bit-7"])
def known(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def machine(known: bool) -> Iterator[Machine]:
    """A machine with and without bit 7, its balloon inflated."""
    with machine_of(FEATURES if known else FEATURES & ~BIT7) as machine:
        machine.balloon(BALLOON * PAGE_SIZE)
        yield machine


def balloon_of(machine: Machine) -> list[int]:
    return sorted(walk(machine.mm.mem, int(machine.mm.mem.vm[0].balloon_head)))


def move(machine: Machine, pfns: list[int]) -> list[int]:
    """Move balloon pages as a contiguous allocation would; return those that stayed."""
    out = np.zeros(8, dtype=np.int64)
    heads = []
    for pfn in pfns:
        assert isolate_migratepages_range(machine.mm.mem, pfn, pfn + 1, out) == 1
        heads.append(int(out[0]))
    # Taken beforehand: a page that was just freed would be the next one's target.
    targets = [target(machine.mm, 0) for _ in heads]
    return migrate_pages(machine.mm, heads, lambda order: targets.pop())


def take_all_as_zero(machine: Machine) -> None:
    """Hand out every page that is left as a zeroed page, and read each."""
    mm = machine.mm
    taken = mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO, SIZE // PAGE_SIZE).tolist()
    assert len(taken) > 1000
    for pfn in taken:
        assert reads_zero(mm, pfn), hex(pfn)
        page_bytes(mm, pfn)[:] = DIRT
        mm.free_pages(Pfn(pfn))


def test_pages_move_by_range_and_the_host_is_told_of_both(machine: Machine, known: bool) -> None:
    mm = machine.mm
    before = balloon_of(machine)
    assert len(before) == BALLOON
    told = machine.device.metrics.discarded_bytes
    assert move(machine, before[:40]) == []
    check(mm)
    after = balloon_of(machine)
    assert len(after) == BALLOON == machine.driver.num_pages
    assert not set(before[:40]) & set(after)
    new = set(after) - set(before)
    assert machine.device.metrics.discarded_bytes == told + 40 * PAGE_SIZE
    assert all(is_marked_zero(mm.mem, pfn) == known for pfn in after)
    assert all(reads_zero(mm, pfn) for pfn in new)
    # Patch 37: what leaves the balloon by migration is as zero as what leaves it by deflation.
    assert [is_marked_zero(mm.mem, pfn) for pfn in before[:40]] == [known] * 40
    assert mm.vm_stats().bad_pages == 0
    take_all_as_zero(machine)
    check(mm)
    assert machine.balloon(0) == 0
    check(mm)
    take_all_as_zero(machine)
    check(mm)


def test_compaction_moves_balloon_pages_and_processes_keep_their_bytes(known: bool) -> None:
    with machine_of(FEATURES if known else FEATURES & ~BIT7) as machine, machine.spawn() as process:
        mm = machine.mm
        _, held = scatter(process, 1500, 60)
        machine.balloon(BALLOON * PAGE_SIZE)
        before = balloon_of(machine)
        assert mm.compact_memory() > 40
        check(mm)
        after = balloon_of(machine)
        assert len(after) == BALLOON == machine.driver.num_pages
        assert sum(after) > sum(before), "free memory gathers at the start of the zone"
        assert holds(process, held)
        assert all(is_marked_zero(mm.mem, pfn) == known for pfn in after)
        take_all_as_zero(machine)
        machine.balloon(0)
        check(mm)
        take_all_as_zero(machine)
        assert holds(process, held)


def test_pages_that_left_by_migration_are_not_zeroed_again_with_bit_7(machine: Machine, known: bool) -> None:
    mm = machine.mm
    old = balloon_of(machine)[:20]
    assert move(machine, old) == []
    # Parked last, so handed out first.
    stats = mm.vm_stats()
    again = mm.alloc_pages_bulk(GFP_HIGHUSER_MOVABLE | GFP_ZERO, 20).tolist()
    assert set(again) == set(old)
    assert all(reads_zero(mm, pfn) for pfn in again)
    assert mm.vm_stats().known_zero_bytes - stats.known_zero_bytes == (20 * PAGE_SIZE if known else 0)
    assert mm.vm_stats().zeroed_bytes - stats.zeroed_bytes == (0 if known else 20 * PAGE_SIZE)
    assert not any(is_marked_zero(mm.mem, pfn) for pfn in again)


def test_a_busy_balloon_keeps_its_page(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """-EAGAIN: compaction in the middle of a request of the balloon's own puts the page back."""
    mm = machine.mm
    before = balloon_of(machine)
    outcomes: list[list[int]] = []
    moved: list[int] = []
    tell = Inflation.tell_host

    def tell_and_migrate(self: Inflation, queue: object, pfns: object, **more: bool) -> int:
        outcomes.append(move(machine, before[:3]))
        moved.append(mm.compact_memory())
        assert balloon_of(machine)[:1] != []
        return tell(self, queue, pfns, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Inflation, "tell_host", tell_and_migrate)
    machine.balloon((BALLOON + 1) * PAGE_SIZE)
    monkeypatch.undo()
    assert outcomes == [before[:3]]
    assert moved == [0]
    assert set(before) < set(balloon_of(machine))
    assert int(mm.mem.vm[0].pgmigrate_fail) >= 3
    check(mm)
    assert machine.balloon(0) == 0
    take_all_as_zero(machine)
    check(mm)


@pytest.mark.parametrize("used_len", [0, 2, 1 << 31], ids=["nothing", "beyond-the-buffer", "absurd"])
def test_only_a_used_length_that_covers_the_bit_makes_the_new_page_known(
    used_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bitmap of one page is one byte: a length of 0 has not written it."""
    with machine_of() as machine:
        mm = machine.mm
        machine.balloon(BALLOON * PAGE_SIZE)
        before = balloon_of(machine)
        tell = Inflation.tell_host

        def shorten(self: Inflation, queue: object, pfns: object, *, bitmap: bool = False) -> int:
            length = tell(self, queue, pfns, bitmap=bitmap)  # type: ignore[arg-type]
            return used_len if bitmap else length

        monkeypatch.setattr(Inflation, "tell_host", shorten)
        assert move(machine, before[:10]) == []
        monkeypatch.undo()
        new = set(balloon_of(machine)) - set(before)
        assert len(new) == 10
        assert [is_marked_zero(mm.mem, pfn) for pfn in new] == [used_len > 0] * 10
        check(mm)
        machine.balloon(0)
        take_all_as_zero(machine)
        check(mm)


@pytest.mark.parametrize("at", ["inflate", "deflate"])
def test_a_device_that_fails_loses_nothing(known: bool, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver resets it; the old page is put back, the new one freed as unknown, and removal works."""
    with machine_of(FEATURES if known else FEATURES & ~BIT7) as machine:
        mm = machine.mm
        machine.balloon(BALLOON * PAGE_SIZE)
        before = balloon_of(machine)
        free = mm.vm_stats().free_pages
        tell = Inflation.tell_host

        def fail(self: Inflation, queue: object, pfns: object, *, bitmap: bool = False) -> int:
            if (queue is self._inflate) == (at == "inflate"):
                error = DriverError("device did not answer")
                machine.driver._device_failed(error)
                raise error
            return tell(self, queue, pfns, bitmap=bitmap)  # type: ignore[arg-type]

        monkeypatch.setattr(Inflation, "tell_host", fail)
        assert move(machine, before[:3]) == before[:3]
        monkeypatch.undo()
        assert machine.driver.state is State.FAILED
        assert balloon_of(machine) == before
        assert mm.vm_stats().free_pages == free
        check(mm)
        assert mm.compact_memory() == 0
        check(mm)
        machine.driver.remove()
        assert mm.balloon.count == 0
        check(mm)
        take_all_as_zero(machine)
        check(mm)


def test_without_a_driver_balloon_pages_stay_and_with_a_new_one_they_move(machine: Machine) -> None:
    mm = machine.mm
    out = np.zeros(8, dtype=np.int64)
    page = balloon_of(machine)[0]
    machine.driver.freeze()
    assert mm.balloon.count == 0
    machine.driver.restore()
    page = balloon_of(machine)[0]
    assert move(machine, [page]) == []
    machine.driver.remove()
    lonely = mm.alloc_pages(GFP_HIGHUSER_MOVABLE)
    mm.balloon.enqueue(np.array([lonely], dtype=np.int64))
    assert isolate_migratepages_range(mm.mem, lonely, lonely + 1, out) < 0
    machine.driver.probe()
    assert isolate_migratepages_range(mm.mem, lonely, lonely + 1, out) == 1
    mm.balloon.putback(lonely)


def test_poisoning_leaves_nothing_known() -> None:
    """Bit 7 is not negotiated then; a page that left by migration holds the poison, not zeros."""
    with Machine(SIZE, device=DeviceConfig(features=FEATURES), mm=MmConfig(page_poisoning=True)) as machine:
        mm = machine.mm
        machine.balloon(40 * PAGE_SIZE)
        old = balloon_of(machine)[:10]
        assert move(machine, old) == []
        check(mm)
        assert not any(is_marked_zero(mm.mem, pfn) for pfn in [*old, *balloon_of(machine)])
        assert page_bytes(mm, old[0]).tobytes() == b"\xaa" * PAGE_SIZE
        machine.balloon(0)
        assert mm.vm_stats().poison_errors == 0
        check(mm)


def test_memory_that_runs_out_in_the_middle_leaves_the_rest_in_the_balloon(machine: Machine) -> None:
    mm = machine.mm
    before = balloon_of(machine)
    zones = mm.mem.zone
    zones.watermark_min = zones.watermark_low = zones.watermark_high = 0
    while int(alloc_pages(mm.mem, GFP_HIGHUSER_MOVABLE, 0, -1, 0, 0)) != NO_PAGE:
        pass
    assert move(machine, before[:5]) == before[:5]
    assert balloon_of(machine) == before
    check(mm)
