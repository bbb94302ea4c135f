# SPDX-License-Identifier: GPL-2.0-only
"""Each hostile act is what it says, and everything that a device may make of it is named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hostzero.conform.fuzz import wild
from hostzero.conform.fuzz.arena import DATA_PFN, END_PFN, LOW_GPAS, LOW_PAGES, Arena
from hostzero.conform.fuzz.driver import BUFFERS_AT, Driver, Queue
from hostzero.conform.fuzz.files import COUNTER_MAX
from hostzero.conform.fuzz.peer import Log, Peer
from hostzero.conform.fuzz.wild import ACTS, KICKS, misbehave
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.virtio.features import QueueRole
from hostzero.virtio.mock import MockDevice, RawDescriptor
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
from tests.conform.fuzz import fakes

SEEDS = range(12)


@contextlib.contextmanager
def driver_at(folder: Path, low: int = 0, seed: int = 1) -> Iterator[Driver]:
    with (
        fakes.backend(folder / "sock"),
        contextlib.closing(Peer(folder / "sock", Log())) as peer,
        contextlib.closing(Arena(low)) as arena,
        contextlib.closing(Driver(peer, arena)) as driver,
    ):
        driver.start(Random(seed))
        yield driver


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    with driver_at(tmp_path) as made:
        yield made


@pytest.fixture
def queue(driver: Driver) -> Queue:
    return driver.queues[QueueRole.INFLATE]


def act(kind: str, driver: Driver, queue: Queue, seed: int = 1) -> None:
    ACTS[kind][1](Random(seed), driver, queue)


def chain(ring: MockDevice, head: int) -> list[RawDescriptor]:
    """A chain as somebody follows it who stops after as many descriptors as there are."""
    found: list[RawDescriptor] = []
    while head < ring.layout.size and len(found) < ring.layout.size:
        found.append(ring.descriptor(head))
        if not found[-1].flags & VIRTQ_DESC_F_NEXT:
            break
        head = found[-1].next
    return found


def do_everything_with(arena: Arena, descriptors: set[RawDescriptor]) -> int:
    """Drop each page that a descriptor names in any reading, and answer; return how many pages went."""
    memory: set[int] = set()
    inside = [each for each in descriptors if arena.guest.contains(Gpa(each.addr), max(each.length, 1))]
    for each in inside:
        if not each.addr % PAGE_SIZE and not each.length % PAGE_SIZE:
            memory |= set(range(each.addr >> PAGE_SHIFT, (each.addr + each.length) >> PAGE_SHIFT))
        data = arena.guest.read(Gpa(each.addr), min(each.length, 1 << 16))
        for shift in range(min(4, len(data))):
            words = np.frombuffer(data[shift : shift + (len(data) - shift) // 4 * 4], dtype="<u4")
            memory |= set(words[(words >= DATA_PFN) & (words < END_PFN)].tolist())
    memory &= set(range(DATA_PFN, END_PFN))
    for pfn in memory:
        fakes.drop(arena, pfn << PAGE_SHIFT, PAGE_SIZE)
    for each in inside:
        if each.flags & VIRTQ_DESC_F_WRITE:
            arena.guest.write(Gpa(each.addr), b"\x55" * min(each.length, 512))
    return len(memory)


# ---------------------------------------------------------------------------- what may come of it


@pytest.mark.parametrize("kind", [kind for kind in ACTS if kind != "memory: sealed"])
def test_whatever_a_device_may_make_of_an_act_is_named(tmp_path: Path, kind: str) -> None:
    low = LOW_GPAS[list(ACTS).index(kind) % len(LOW_GPAS)]
    dropped = 0
    with driver_at(tmp_path, low, seed=3) as driver:
        for seed in range(8):
            queue = list(driver.queues.values())[seed % len(driver.queues)]
            act(kind, driver, queue, seed)
            ring = MockDevice(queue.ring.memory, queue.ring.layout)
            table = {ring.descriptor(index) for index in range(ring.layout.size)}
            dropped += do_everything_with(driver.arena, table)
            driver.arena.check()
    assert dropped > 0 or kind not in {"ring: any descriptors", "ring: page numbers", "ring: blocks"}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_number_that_is_written_in_two_parts_is_seen(driver: Driver, cut: int, first: int) -> None:
    at, number = driver.arena.low + BUFFERS_AT + 100, (DATA_PFN + 7).to_bytes(4, "little")
    parts = [(at, number[:cut]), (at + cut, number[cut:])]
    for gpa, data in (parts[first], parts[1 - first]):
        wild._write(driver, gpa, data)
    fakes.drop(driver.arena, (DATA_PFN + 7) << PAGE_SHIFT, PAGE_SIZE)
    driver.arena.check()


@pytest.mark.parametrize("at", [0, LOW_PAGES * PAGE_SIZE - 4])
def test_what_lies_beside_low_memory_is_not_looked_at(driver: Driver, at: int) -> None:
    wild._write(driver, driver.arena.low + at, b"1234")


def test_an_act_is_drawn_counted_and_notified(driver: Driver) -> None:
    for seed in range(300):
        misbehave(Random(seed), driver)
        (queue,) = [queue for queue in driver.queues.values() if kicked(queue)]
        assert driver.peer.log.last[-1].endswith(
            f"on the {queue.role.value} queue of {queue.ring.layout.size}"
        )
        os.set_blocking(queue.call, False)
    assert set(driver.peer.log.done) == {*ACTS, "driver"}


def kicked(queue: Queue) -> int:
    try:
        return os.eventfd_read(queue.kick)
    except BlockingIOError:
        return 0


def test_an_act_comes_again_with_its_seed(tmp_path: Path) -> None:
    memories = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        with driver_at(folder) as driver:
            for seed in range(60):
                misbehave(Random(seed), driver)
            memories.append((driver.arena.guest.read(Gpa(0), 256 * PAGE_SIZE), list(driver.peer.log.last)))
    assert memories[0] == memories[1]


# ---------------------------------------------------------------------------- each act


def offered(queue: Queue) -> list[int]:
    return MockDevice(queue.ring.memory, queue.ring.layout).offered()


def test_any_descriptors_are_heads(driver: Driver, queue: Queue) -> None:
    act("ring: any descriptors", driver, queue)
    heads = offered(queue)
    assert heads
    assert max(heads) < queue.ring.layout.size
    ring = MockDevice(queue.ring.memory, queue.ring.layout)
    assert len({ring.descriptor(index) for index in range(min(32, queue.ring.layout.size))}) > 2


def test_any_bytes_are_everywhere(driver: Driver, queue: Queue) -> None:
    layout, before = queue.ring.layout, driver.arena.guest.read(queue.ring.layout.used, 6)
    act("ring: any bytes", driver, queue)
    assert any(driver.arena.guest.read(layout.desc, 16 * layout.size))
    assert any(driver.arena.guest.read(layout.avail, 6))
    assert driver.arena.guest.read(layout.used, 6) == before


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loop_has_no_end(driver: Driver, queue: Queue, seed: int) -> None:
    act("ring: loops", driver, queue, seed)
    ring = MockDevice(queue.ring.memory, queue.ring.layout)
    for head in offered(queue):
        assert len(chain(ring, head)) == queue.ring.layout.size


@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_chain_has_every_descriptor(driver: Driver, queue: Queue, seed: int) -> None:
    act("ring: long chains", driver, queue, seed)
    ring = MockDevice(queue.ring.memory, queue.ring.layout)
    assert offered(queue) == [0]
    links = chain(ring, 0)
    assert len(links) == queue.ring.layout.size
    assert not links[-1].flags & VIRTQ_DESC_F_NEXT
    assert len({(link.addr, link.length) for link in links}) == 1


def test_an_index_jumps_too_far_and_backwards(driver: Driver, queue: Queue) -> None:
    moves = set()
    for seed in SEEDS:
        act("ring: index jumps", driver, queue, seed)
        moves.add((queue.ring.published_idx - queue.ring.avail_idx) & 0xFFFF)
    assert {0xFFFF, queue.ring.layout.size + 1, 0x8000} <= moves


def test_heads_are_twice_the_same_and_out_of_the_table(driver: Driver, queue: Queue) -> None:
    seen = set()
    for seed in SEEDS:
        before = MockDevice(queue.ring.memory, queue.ring.layout, queue.ring.avail_idx)
        act("ring: heads", driver, queue, seed)
        seen.add(tuple(before.offered()))
    assert {(0, 0), (queue.ring.layout.size,), (0xFFFF,)} <= seen


def test_page_numbers_are_too_many_and_ragged(driver: Driver, queue: Queue) -> None:
    lengths, answers = set(), set()
    for seed in range(60):
        act("ring: page numbers", driver, queue, seed)
        ring = MockDevice(queue.ring.memory, queue.ring.layout)
        links = chain(ring, 0)
        assert links[0].addr == driver.arena.low + BUFFERS_AT
        assert not links[0].flags & VIRTQ_DESC_F_WRITE
        lengths.add(links[0].length)
        answers |= {link.length for link in links[1:]}
    assert {0, 1024, 4 * 4096, 4 * 4097, 4 * 8192} <= lengths
    assert any(length % 4 for length in lengths)
    assert {0, 1, 32, 4096} <= answers


def test_blocks_are_for_the_device_to_write(driver: Driver, queue: Queue) -> None:
    lengths = set()
    for seed in SEEDS:
        before = MockDevice(queue.ring.memory, queue.ring.layout, queue.ring.avail_idx)
        act("ring: blocks", driver, queue, seed)
        for head in before.offered():
            (block,) = chain(before, head)
            assert block.flags == VIRTQ_DESC_F_WRITE
            lengths.add(block.length)
    assert 1 << 30 in lengths
    assert any(length % PAGE_SIZE for length in lengths)
    assert any(not length % PAGE_SIZE for length in lengths)


def test_events_overwrite_what_the_device_wrote(driver: Driver, queue: Queue) -> None:
    before = queue.ring.published_idx
    act("ring: events", driver, queue)
    layout = queue.ring.layout
    assert any(driver.arena.guest.read(layout.used, 6 + 8 * layout.size))
    assert driver.arena.guest.read(layout.avail, 2) != b"\0\0"
    assert queue.ring.published_idx == before


def test_a_flood_is_one_of_notifications(driver: Driver, queue: Queue) -> None:
    act("ring: endless kicks", driver, queue)
    assert kicked(queue) == KICKS
    assert offered(queue) == []


def test_a_full_counter_may_block_and_an_answer_is_due(driver: Driver, queue: Queue) -> None:
    for _ in range(2):
        act("ring: full counters", driver, queue)
        assert os.get_blocking(queue.call)
        assert offered(queue)
    os.set_blocking(queue.call, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_write(queue.call, 1)
    assert os.eventfd_read(queue.call) == COUNTER_MAX


def test_a_file_that_is_sealed_keeps_its_pages(driver: Driver, queue: Queue) -> None:
    act("memory: sealed", driver, queue)
    act("memory: sealed", driver, queue)
    assert fcntl.fcntl(driver.arena.fd, fcntl.F_GET_SEALS)
    with pytest.raises(OSError, match="not permitted") as caught:
        driver.arena.drop_low(0, 1)
    assert caught.value.errno == errno.EPERM
    act("memory: dropped", driver, queue)  # does nothing then


def test_pages_of_the_rings_are_dropped(driver: Driver, queue: Queue) -> None:
    everything = b"\x11" * (128 * PAGE_SIZE)
    driver.arena.guest.write(Gpa(driver.arena.low), everything)
    act("memory: dropped", driver, queue)
    left = driver.arena.guest.read(Gpa(driver.arena.low), len(everything))
    assert left.count(0) == 4 * PAGE_SIZE
    driver.arena.check()
