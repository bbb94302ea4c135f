# SPDX-License-Identifier: GPL-2.0-only
"""A well-formed driver: it brings the device up whatever came before, and its requests must be answered.

That is the other half of the oracle. A backend that refuses everything after one malformed message
leaks nothing and is useless; so whatever was sent, a right sequence has to be served next, each
request of it answered, and each claim of zero be true.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from hostzero.conform.fuzz.arena import DATA_PAGES, DATA_PFN, Arena
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.conform.fuzz.peer import Peer
from hostzero.conform.fuzz.watch import PATIENCE
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.vhost_user.frontend_session import WANTED
from hostzero.vhost_user.payloads import U64, VringAddr, VringFd, VringState
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, ProtocolFeature, Request
from hostzero.virtio.balloon import CONFIG_POISON_VAL
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.mock import MockGuest
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE, RingLayout

QUEUES: Final = len(QueueRole)
RING_SIZES: Final = (4, 16, 128, 256)
RING_PAGES: Final = 16
BUFFERS_AT: Final = 128 * PAGE_SIZE
"""Where in LOW the buffers are; before are the rings."""
BITMAP_AT: Final = BUFFERS_AT + 32 * PAGE_SIZE
_LOOK_EVERY: Final = 0.0005

_OPTIONAL: Final = (
    *(Feature.MUST_TELL_HOST, Feature.STATS_VQ, Feature.DEFLATE_ON_OOM, Feature.FREE_PAGE_HINT),
    *(Feature.PAGE_POISON, Feature.REPORTING, Feature.DEVICE_INIT_REPORTED),
    *(Feature.DEVICE_INIT_ON_INFLATE, Feature.RING_EVENT_IDX),
)


@dataclass
class Queue:
    """One queue that runs.

    Attributes:
        role: what it carries.
        index: its number.
        ring: the guest's side of it.
        kick: the eventfd for the device.
        call: the eventfd from it.
    """

    role: QueueRole
    index: int
    ring: MockGuest
    kick: int
    call: int


class Driver:
    """One driver's life: from the reset to the next.

    Attributes:
        arena: guest memory.
        features: what was negotiated.
        queues: the queues by role.
    """

    def __init__(self, peer: Peer, arena: Arena) -> None:
        """Make the descriptors; nothing is sent yet."""
        self.peer = peer
        self.arena = arena
        self.features = Feature(0)
        self.queues: dict[QueueRole, Queue] = {}
        self._eventfds: list[int] = []
        self._channel: socket.socket | None = None

    # ------------------------------------------------------------------ bringing it up

    def start(self, rng: Random) -> None:
        """Bring the device up, whatever state it is in.

        Raises:
            Found: something well-formed is refused or not answered.
            Ended: the backend has closed.
        """
        peer = self.peer
        sizes = [rng.choice(RING_SIZES) for _ in range(QUEUES)]
        wanted = [feature for feature in _OPTIONAL if rng.random() < 0.75]
        poison = rng.choice((0, 0, 0xAAAAAAAA))
        peer.log.note("driver", f"starts with {' '.join(str(f.name) for f in wanted)}, sizes {sizes}")
        peer.sync()
        self.stop()
        # Any of this may be refused, because it was said before; afterwards nothing may.
        offered = peer.number(Request.GET_FEATURES)
        protocol = WANTED & ProtocolFeature(peer.number(Request.GET_PROTOCOL_FEATURES))
        peer.send(Request.SET_PROTOCOL_FEATURES, U64(int(protocol)).pack())
        peer.send(Request.SET_OWNER)
        peer.sync()
        peer.acknowledges = ProtocolFeature.REPLY_ACK in protocol
        if ProtocolFeature.RESET_DEVICE in protocol:
            peer.tell(Request.RESET_DEVICE)
        self.features = Feature.VERSION_1
        for feature in wanted:
            self.features |= feature & offered
        if Feature.REPORTING not in self.features:
            self.features &= ~Feature.DEVICE_INIT_REPORTED
        if ProtocolFeature.BACKEND_REQ in protocol:
            self._channel, theirs = socket.socketpair()
            with theirs:
                peer.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        peer.tell(Request.SET_FEATURES, U64(int(self.features) | F_PROTOCOL_FEATURES).pack())
        table, fds = self.arena.table()
        peer.tell(Request.SET_MEM_TABLE, table.pack(), fds)
        if ProtocolFeature.CONFIG in protocol:
            config = struct.pack("=III", CONFIG_POISON_VAL, 4, 0) + struct.pack("<I", poison)
            peer.tell(Request.SET_CONFIG, config)
        for index, role in enumerate(queue_roles(self.features)):
            self._start_queue(role, index, sizes[index])

    def stop(self) -> None:
        """Stop every ring, in whatever state each is; refusals are none of a mistake here."""
        for index in range(QUEUES):
            self.peer.send(Request.SET_VRING_ENABLE, VringState(index, 0).pack())
        for index in range(QUEUES):
            self.peer.send(Request.GET_VRING_BASE, VringState(index, 0).pack())
        self.peer.sync()

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self._eventfds:
            os.close(fd)
        self._eventfds = []
        if self._channel is not None:
            self._channel.close()
        self.queues.clear()

    def _start_queue(self, role: QueueRole, index: int, size: int) -> None:
        peer, arena = self.peer, self.arena
        at = arena.low + index * RING_PAGES * PAGE_SIZE
        layout = RingLayout.contiguous(arena.guest, size, Gpa(at))
        ring = MockGuest(arena.guest, layout)
        kick, call, err = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3))
        self._eventfds += [kick, call, err]
        addr = VringAddr(
            index, 0, arena.user(layout.desc), arena.user(layout.used), arena.user(layout.avail), 0
        )
        peer.tell(Request.SET_VRING_NUM, VringState(index, size).pack())
        peer.tell(Request.SET_VRING_BASE, VringState(index, 0).pack())
        peer.tell(Request.SET_VRING_ADDR, addr.pack())
        for request, fd in (
            (Request.SET_VRING_ERR, err),
            (Request.SET_VRING_CALL, call),
            (Request.SET_VRING_KICK, kick),
        ):
            peer.tell(request, VringFd(index).pack(), [fd])
        peer.tell(Request.SET_VRING_ENABLE, VringState(index, 1).pack())
        self.queues[role] = Queue(role, index, ring, kick, call)

    # ------------------------------------------------------------------ requests that are answered

    def work(self, rng: Random) -> None:
        """Send one well-formed request and check its answer, to the byte."""
        role = rng.choice([role for role in self.queues if role is not QueueRole.FREE_PAGE])
        first = rng.randrange(DATA_PFN, DATA_PFN + DATA_PAGES)
        count = min(rng.choice((1, 2, 8, 64, 256)), DATA_PFN + DATA_PAGES - first)
        if role is QueueRole.REPORTING:
            self._report(first, count)
        elif role is QueueRole.STATS:
            self._stats(rng.randbytes(10 * rng.randrange(1, 17)))
        else:
            pfns = list(range(first, first + count))
            rng.shuffle(pfns)
            self._balloon(self.queues[role], pfns)

    def _report(self, first: int, count: int) -> None:
        self.peer.log.note("report", f"{count} pages from {first:#x}")
        gpa, length = first << PAGE_SHIFT, count << PAGE_SHIFT
        self.arena.name_segment(gpa, length)
        used = self._send(self.queues[QueueRole.REPORTING], (), [(gpa, length)])
        if Feature.DEVICE_INIT_REPORTED not in self.features:
            return  # a used length means nothing then
        if used not in {0, length}:
            raise Found(Kind.CLAIM, f"a report of {length} bytes is answered by a length of {used}")
        if used and self.arena.pages(first, count).any():
            raise Found(Kind.CLAIM, f"a report of {count} pages at {first:#x} is claimed zero and is not")
        self.peer.log.answers["zero" if used else "not zero"] += count

    def _balloon(self, queue: Queue, pfns: Sequence[int]) -> None:
        self.peer.log.note(queue.role.value, f"{len(pfns)} pages around {min(pfns):#x}")
        low, guest = self.arena.low, self.arena.guest
        data = np.array(pfns, dtype="<u4").tobytes()
        guest.write(Gpa(low + BUFFERS_AT), data)
        size = (len(pfns) + 7) // 8
        inflates = queue.role is QueueRole.INFLATE
        wants = inflates and Feature.DEVICE_INIT_ON_INFLATE in self.features
        guest.write(Gpa(low + BITMAP_AT), b"\xff" * size)
        if inflates:
            self.arena.name_words(data)
        writable = [(low + BITMAP_AT, size)] if wants else []
        used = self._send(queue, [(low + BUFFERS_AT, len(data))], writable)
        if not inflates:
            # Pages that nobody gave away must not be named where a wild request finds them.
            guest.write(Gpa(low + BUFFERS_AT), bytes(len(data)))
        if not wants:
            return
        if used not in {0, size}:
            raise Found(Kind.CLAIM, f"{len(pfns)} pages are answered by {used} bytes of bitmap")
        bitmap = np.frombuffer(guest.read(Gpa(low + BITMAP_AT), used), dtype=np.uint8)
        said = np.unpackbits(bitmap, bitorder="little")[: len(pfns)]
        for position in np.flatnonzero(said).tolist():
            if self.arena.pages(pfns[position], 1).any():
                raise Found(Kind.CLAIM, f"page {pfns[position]:#x} is inflated, claimed zero and is not")
        self.peer.log.answers["zero"] += int(said.sum())
        self.peer.log.answers["not zero"] += len(pfns) - int(said.sum())

    # The device keeps the buffer until the next one is due, so no answer is waited for.
    def _stats(self, data: bytes) -> None:
        self.peer.log.note("stats", f"{len(data)} bytes")
        queue = self.queues[QueueRole.STATS]
        self.arena.guest.write(Gpa(self.arena.low + BITMAP_AT + 8 * PAGE_SIZE), data)
        self._put(queue, [(self.arena.low + BITMAP_AT + 8 * PAGE_SIZE, len(data))], ())
        os.eventfd_write(queue.kick, 1)

    def _put(
        self, queue: Queue, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]
    ) -> int:
        segments = [(gpa, length, 0) for gpa, length in readable]
        segments += [(gpa, length, VIRTQ_DESC_F_WRITE) for gpa, length in writable]
        ring = queue.ring
        head = ring.chain(segments, ring.avail_idx * 2 % ring.layout.size)
        ring.set_used_event(ring.used_idx)
        ring.offer(head)
        return head

    def _send(
        self, queue: Queue, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]
    ) -> int:
        before = queue.ring.used_idx
        head = self._put(queue, readable, writable)
        os.eventfd_write(queue.kick, 1)
        deadline = time.monotonic() + PATIENCE
        while queue.ring.used_idx == before:
            if time.monotonic() > deadline:
                raise Found(Kind.SILENT, f"a request on the {queue.role.value} queue is not answered")
            if select.select([self.peer.sock], [], [], _LOOK_EVERY)[0]:
                self.peer.sync()  # raises, if it is the end
        back = queue.ring.returned()
        if len(back) != 1 or back[0][0] != head:
            raise Found(Kind.CLAIM, f"head {head} of the {queue.role.value} queue came back as {back}")
        return back[0][1]
