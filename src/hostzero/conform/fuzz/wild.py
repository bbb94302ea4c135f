# SPDX-License-Identifier: GPL-2.0-only
"""A hostile guest: what it can write into rings that run, and how often it can notify."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Final

import numpy as np

from hostzero.conform.fuzz import draw
from hostzero.conform.fuzz.arena import LOW_PAGES
from hostzero.conform.fuzz.driver import BITMAP_AT, BUFFERS_AT, Driver, Queue
from hostzero.conform.fuzz.files import COUNTER_MAX
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE

_FLAGS: Final = (0, 0, 1, 1, 2, 2, 3, 3, 4, 7, 8, 0xFFFF)
KICKS: Final = 2000
"""Notifications for nothing in one flood."""


def misbehave(rng: Random, driver: Driver) -> None:
    """Do one hostile thing to one queue, and notify the device."""
    kinds = list(ACTS)
    (kind,) = rng.choices(kinds, [ACTS[kind][0] for kind in kinds])
    queue = rng.choice(list(driver.queues.values()))
    driver.peer.log.note(kind, f"on the {queue.role.value} queue of {queue.ring.layout.size}")
    ACTS[kind][1](rng, driver, queue)
    _kick(queue)


def _kick(queue: Queue, count: int = 1) -> None:
    with suppress(BlockingIOError):
        for _ in range(count):
            os.eventfd_write(queue.kick, 1)


def _write(driver: Driver, gpa: int, data: bytes) -> None:
    # Whatever is written where a device may read could be taken for page numbers, and so could
    # its ends together with what lies beside them.
    arena = driver.arena
    arena.guest.write(Gpa(gpa), data)
    first = max(gpa - 3, arena.low)
    end = min(gpa + len(data) + 3, arena.low + LOW_PAGES * PAGE_SIZE)
    arena.name_words(arena.guest.read(Gpa(first), end - first))


def _descriptor(rng: Random, driver: Driver, queue: Queue, index: int) -> None:
    gpa, length = draw.address(rng, driver.arena), draw.length(rng)
    flags, following = rng.choice(_FLAGS), rng.randrange(queue.ring.layout.size + 2)
    driver.arena.name_segment(gpa, length)
    _write(driver, queue.ring.layout.desc + 16 * index, struct.pack("<QIHH", gpa, length, flags, following))


def _offer_anything(rng: Random, driver: Driver, queue: Queue) -> None:
    """Random descriptors, each offered as a head."""
    size = queue.ring.layout.size
    for index in range(min(size, 32)):
        _descriptor(rng, driver, queue, index)
    queue.ring.offer(*[rng.randrange(size) for _ in range(rng.randrange(1, min(size, 32) + 1))])


def _table(rng: Random, driver: Driver, queue: Queue) -> None:
    """Random bytes over the whole ring."""
    layout = queue.ring.layout
    for start, length in ((layout.desc, 16 * layout.size), (layout.avail, 6 + 2 * layout.size)):
        _write(driver, start, rng.randbytes(length))


def _loop(rng: Random, driver: Driver, queue: Queue) -> None:
    """Chains that come back to themselves."""
    size = queue.ring.layout.size
    length = rng.randrange(1, min(size, 16) + 1)
    flags = rng.choice((1, 3))
    for index in range(length):
        gpa = driver.arena.low + BUFFERS_AT + 64 * index
        queue.ring.descriptor(index, gpa, rng.choice((0, 4, 64)), flags, (index + 1) % length)
    queue.ring.offer(0, *[rng.randrange(length) for _ in range(3)])


def _long_chain(rng: Random, driver: Driver, queue: Queue) -> None:
    """Every descriptor of the ring in one chain, of segments large or empty."""
    size = queue.ring.layout.size
    length = rng.choice((0, 1, 4, 4096, 1 << 30))
    gpa = rng.choice((draw.address(rng, driver.arena), driver.arena.low + BUFFERS_AT))
    flag = rng.choice((0, VIRTQ_DESC_F_WRITE))
    driver.arena.name_segment(gpa, length)
    queue.ring.chain([(gpa, length, flag)] * size, 0)
    queue.ring.offer(0)


def _jump(rng: Random, _driver: Driver, queue: Queue) -> None:
    """An available index that moves by more than the ring, or backwards."""
    queue.ring.set_avail_idx(queue.ring.avail_idx + rng.choice((-1, -2, queue.ring.layout.size + 1, 0x8000)))


def _heads(rng: Random, _driver: Driver, queue: Queue) -> None:
    """Heads outside of the table, or the same one twice."""
    size = queue.ring.layout.size
    queue.ring.offer(*rng.choice(([0, 0], [size], [0xFFFF], [0, size - 1, 0, size])))


def _page_numbers(rng: Random, driver: Driver, queue: Queue) -> None:
    """Arrays of page numbers: page 0 without end, too long, ragged, in a page that they name."""
    count = rng.choice((0, 1, 256, 1024, 4096, 4097, 8192))
    data = np.array(draw.pfns(rng, count), dtype="<u4").tobytes()
    data = data[: max(len(data) - rng.choice((0, 0, 0, 1, 3)), 0)]
    _write(driver, driver.arena.low + BUFFERS_AT, data)
    segments = [(driver.arena.low + BUFFERS_AT, len(data), 0)]
    if rng.random() < 0.7:
        anywhere = draw.address(rng, driver.arena)
        gpa = rng.choice((driver.arena.low + BITMAP_AT, anywhere, queue.ring.layout.used))
        length = rng.choice((0, 1, 31, 32, 512, 4096))
        driver.arena.name_segment(gpa, length)
        segments.append((gpa, length, VIRTQ_DESC_F_WRITE))
    heads = [queue.ring.chain(segments, 2 * slot) for slot in range(min(queue.ring.layout.size // 2, 16))]
    queue.ring.offer(*heads)


def _blocks(rng: Random, driver: Driver, queue: Queue) -> None:
    """Blocks: whole pages, parts of pages, over an end of memory, a GiB, a ring itself."""
    heads = []
    for slot in range(min(queue.ring.layout.size, rng.choice((1, 4, 32)))):
        gpa = rng.choice((draw.address(rng, driver.arena), queue.ring.layout.desc & ~0xFFF))
        length = rng.choice((draw.length(rng), 1 << 30))
        driver.arena.name_segment(gpa, length)
        heads.append(queue.ring.chain([(gpa, length, VIRTQ_DESC_F_WRITE)], slot))
    queue.ring.offer(*heads)


def _events(rng: Random, driver: Driver, queue: Queue) -> None:
    """What the device wrote is overwritten; event index and flags are anything."""
    layout = queue.ring.layout
    queue.ring.set_used_event(rng.randrange(1 << 16))
    queue.ring.set_avail_flags(rng.randrange(1 << 16))
    driver.arena.guest.write(layout.used, rng.randbytes(6 + 8 * layout.size))


def _flood(_rng: Random, _driver: Driver, queue: Queue) -> None:
    """Notifications for nothing."""
    _kick(queue, KICKS)


def _full_counters(_rng: Random, _driver: Driver, queue: Queue) -> None:
    """A full counter that may block, which only who shares the descriptor can arrange."""
    os.set_blocking(queue.call, False)  # it may have been made so before
    with suppress(BlockingIOError):
        os.eventfd_write(queue.call, COUNTER_MAX)
    os.set_blocking(queue.call, True)
    queue.ring.set_used_event(queue.ring.used_idx)
    queue.ring.offer(*range(min(4, queue.ring.layout.size)))


def _seal(_rng: Random, driver: Driver, _queue: Queue) -> None:
    """From now on no discard succeeds."""
    f_seal_future_write = 0x10
    with suppress(OSError):
        fcntl.fcntl(driver.arena.fd, fcntl.F_ADD_SEALS, f_seal_future_write)


def _punch(rng: Random, driver: Driver, _queue: Queue) -> None:
    """The front end drops pages of the rings itself."""
    with suppress(PermissionError):  # sealed before
        driver.arena.drop_low(rng.randrange(64), 4)


ACTS: Final[dict[str, tuple[int, Callable[[Random, Driver, Queue], None]]]] = {
    "ring: any descriptors": (6, _offer_anything),
    "ring: any bytes": (2, _table),
    "ring: loops": (2, _loop),
    "ring: long chains": (2, _long_chain),
    "ring: index jumps": (2, _jump),
    "ring: heads": (2, _heads),
    "ring: page numbers": (5, _page_numbers),
    "ring: blocks": (5, _blocks),
    "ring: events": (2, _events),
    "ring: endless kicks": (1, _flood),
    "ring: full counters": (1, _full_counters),
    "memory: sealed": (1, _seal),
    "memory: dropped": (1, _punch),
}
"""Weight and act by kind."""
