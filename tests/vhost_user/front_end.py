# SPDX-License-Identifier: GPL-2.0-only
"""A front end written by hand: a memfd for guest memory, rings in it, and messages as QEMU sends them.

It writes headers and payloads with plain `struct` calls and shares no code with the messages of
the product, so that a mistake there is not repeated here. Guest memory is two regions of one memfd
with a hole in between, as QEMU shares it.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hostzero.ram import GuestMemory, MemoryRegion, Ram
from hostzero.units import PAGE_SIZE, PMD_SIZE, Gpa
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.mock import MockGuest
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE, RingLayout

LOW_BYTES = 8 * PMD_SIZE
HIGH_BYTES = 8 * PMD_SIZE
RAM_BYTES = LOW_BYTES + HIGH_BYTES
HIGH_GPA = 1 << 32
USER = 0x7F00_0000_0000
USER_HIGH = 0x7E00_0000_0000
QUEUES = 5
RING_SIZE = 128
RING_AT = 64 * PAGE_SIZE
"""The first ring; each has 16 pages."""
SCRATCH_AT = 256 * PAGE_SIZE
"""Room for PFN arrays and bitmaps, below 2 MiB; from 2 MiB on everything is free for requests."""
FILL = 0xA5
BIT_30 = 1 << 30
PROTOCOL = 0x2229
"""MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE."""
NEED_REPLY = 8


class Reply(NamedTuple):
    request: int
    flags: int
    payload: bytes


def header(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("=III", request, flags, size)


class Memory:
    """Guest memory as a front end owns it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, RAM_BYTES)
        self.ram = Ram.from_fd(self.fd, 0, RAM_BYTES)
        self.guest = GuestMemory(
            [
                MemoryRegion(Gpa(0), self.ram, 0, LOW_BYTES),
                MemoryRegion(Gpa(HIGH_GPA), self.ram, LOW_BYTES, HIGH_BYTES),
            ]
        )
        self.bytes = self.ram.array(np.uint8)

    def fill(self) -> None:
        """Fill everything that a request may name."""
        self.bytes[PMD_SIZE:] = FILL

    def table(self) -> bytes:
        """The payload of SET_MEM_TABLE; two descriptors go with it."""
        return struct.pack("=II8Q", 2, 0, 0, LOW_BYTES, USER, 0, HIGH_GPA, HIGH_BYTES, USER_HIGH, LOW_BYTES)

    @property
    def blocks(self) -> int:
        """Bytes of memory that the memfd holds."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        del self.bytes
        self.ram.close()
        os.close(self.fd)


class FrontEnd:
    """One connection, and a driver in the guest behind it."""

    def __init__(self, sock: socket.socket, memory: Memory, *, need_reply: bool = True) -> None:
        self.sock = sock
        sock.settimeout(10)
        self.memory = memory
        self.need_reply = need_reply
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(QUEUES)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(QUEUES)]
        self.errs = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(QUEUES)]
        self.channel, self._theirs = socket.socketpair()
        self.channel.settimeout(10)
        self.features = 0
        self.rings: dict[QueueRole, MockGuest] = {}
        self.indices: dict[QueueRole, int] = {}

    # ---------------------------------------------------------------- messages

    def send(self, request: int, payload: bytes = b"", fds: Iterable[int] = (), flags: int = 1) -> None:
        self.send_raw(header(request, len(payload), flags) + payload, fds)

    def send_raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        numbers = array.array("i", fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> Reply:
        request, flags, size = struct.unpack("=III", self._exactly(12))
        return Reply(request, flags, self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise EOFError("the device closed the connection")
            data += part
        return data

    def ask(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> bytes:
        """Send a request that has a reply of its own, and return that."""
        self.send(request, payload, fds)
        reply = self.receive()
        assert (reply.request, reply.flags) == (request, 5)
        return reply.payload

    def number(self, request: int) -> int:
        return int(struct.unpack("=Q", self.ask(request))[0])

    def ack(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> int:
        """Send a request with NEED_REPLY and return the result: 0 is success."""
        self.send(request, payload, fds, 1 | NEED_REPLY)
        reply = self.receive()
        assert (reply.request, reply.flags) == (request, 5)
        return int(struct.unpack("=Q", reply.payload)[0])

    def do(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> None:
        """Send a request that has to succeed."""
        result = self.ack(request, payload, fds)
        assert result == 0, f"request {request} was refused"

    def vring(self, request: int, index: int, num: int) -> None:
        self.do(request, struct.pack("=II", index, num))

    def vring_fd(self, request: int, index: int, fd: int | None) -> None:
        self.do(request, struct.pack("=Q", index | (1 << 8 if fd is None else 0)), [] if fd is None else [fd])

    def get_config(self, size: int = 16) -> bytes:
        reply = self.ask(24, struct.pack("=III", 0, size, 0) + bytes(size))
        assert reply[:12] == struct.pack("=III", 0, size, 0)
        return reply[12:]

    def set_config(self, num_pages: int = 0, actual: int = 0, cmd_id: int = 0, poison_val: int = 0) -> None:
        data = struct.pack("<IIII", num_pages, actual, cmd_id, poison_val)
        self.do(25, struct.pack("=III", 0, len(data), 0) + data)

    # ---------------------------------------------------------------- QEMU's sequences

    def connect(self) -> None:
        """What QEMU sends at its start."""
        self.number(1)
        self.number(15)
        self.send(16, struct.pack("=Q", PROTOCOL))
        self.number(17)
        self.do(21, b"", [self._theirs.fileno()])
        self.do(3)
        self.number(1)
        for index in range(QUEUES):
            self.vring_fd(13, index, self.calls[index])
            self.vring_fd(14, index, self.errs[index])

    def negotiate(self, features: Feature) -> None:
        self.features = int(features | Feature.VERSION_1)
        self.do(2, struct.pack("=Q", self.features | BIT_30))
        self.indices = {role: n for n, role in enumerate(queue_roles(Feature(self.features)))}

    def share(self) -> None:
        self.do(5, self.memory.table(), [self.memory.fd, self.memory.fd])

    def make_rings(self) -> None:
        """The driver makes its rings; nothing is told to anybody."""
        for role, index in self.indices.items():
            layout = RingLayout.contiguous(
                self.memory.guest, RING_SIZE, Gpa(RING_AT + index * 16 * PAGE_SIZE)
            )
            self.rings[role] = MockGuest(self.memory.guest, layout)

    def describe_rings(self, bases: Sequence[int] = ()) -> None:
        for role, index in self.indices.items():
            layout = self.rings[role].layout
            self.vring(8, index, layout.size)
            self.vring(10, index, bases[index] if bases else 0)
            self.do(
                9,
                struct.pack(
                    "=IIQQQQ",
                    index,
                    0,
                    USER + layout.desc,
                    USER + layout.used,
                    USER + layout.avail,
                    0xDEAD_0000,
                ),
            )
            self.vring_fd(12, index, self.kicks[index])
            self.vring_fd(13, index, self.calls[index])

    def enable(self, value: int = 1) -> None:
        """QEMU enables every queue that it was told of."""
        for index in range(QUEUES):
            self.vring(18, index, value)

    def start(self, features: Feature) -> None:
        """Everything up to a driver that runs."""
        self.connect()
        self.negotiate(features)
        self.share()
        self.make_rings()
        self.describe_rings()
        self.enable()

    def get_base(self, index: int) -> int:
        got, base = struct.unpack("=II", self.ask(11, struct.pack("=II", index, 0)))
        assert got == index
        return int(base)

    def stop(self) -> list[int]:
        """What QEMU sends when the driver goes or the guest is paused; return the bases."""
        self.enable(0)
        return [self.get_base(index) for index in range(len(self.indices))]

    # ---------------------------------------------------------------- the driver

    def put(
        self,
        role: QueueRole,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Write one request into a ring, and publish it."""
        ring = self.rings[role]
        segments = [(gpa, length, 0) for gpa, length in readable]
        segments += [(gpa, length, VIRTQ_DESC_F_WRITE) for gpa, length in writable]
        head = ring.chain(segments, (ring.avail_idx * 4) % RING_SIZE)
        ring.set_used_event(ring.used_idx)
        ring.offer(head)
        return head

    def kick(self, role: QueueRole) -> None:
        os.eventfd_write(self.kicks[self.indices[role]], 1)

    def wait_call(self, role: QueueRole) -> None:
        """Wait until the driver is interrupted."""
        fd = self.calls[self.indices[role]]
        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, f"no interrupt for {role.value}"
        os.eventfd_read(fd)

    def send_request(
        self,
        role: QueueRole,
        readable: Sequence[tuple[int, int]] = (),
        writable: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Put one request, kick, wait for the interrupt, and return the used length."""
        head = self.put(role, readable, writable)
        self.kick(role)
        self.wait_call(role)
        ((returned, used_len),) = self.rings[role].returned()
        assert returned == head
        return used_len

    def report(self, *ranges: tuple[int, int]) -> int:
        return self.send_request(QueueRole.REPORTING, (), ranges)

    def inflate(self, pfns: Sequence[int]) -> tuple[int, bytes]:
        """Inflate and return the used length and the bitmap."""
        data = np.array(pfns, dtype="<u4").tobytes()
        bitmap = (len(pfns) + 7) // 8
        self.memory.guest.write(Gpa(SCRATCH_AT), data)
        self.memory.guest.write(Gpa(SCRATCH_AT + 32 * PAGE_SIZE), b"\xff" * bitmap)
        used = self.send_request(
            QueueRole.INFLATE, [(SCRATCH_AT, len(data))], [(SCRATCH_AT + 32 * PAGE_SIZE, bitmap)]
        )
        return used, self.memory.guest.read(Gpa(SCRATCH_AT + 32 * PAGE_SIZE), bitmap)

    def config_changed(self) -> None:
        """Take one CONFIG_CHANGE from the backend channel; it must not ask for a reply."""
        assert self.channel.recv(12, socket.MSG_WAITALL) == header(2, 0)

    def nothing_on_the_channel(self) -> bool:
        ready, _, _ = select.select([self.channel], [], [], 0)
        return not ready

    def close(self) -> None:
        for fd in (*self.kicks, *self.calls, *self.errs):
            os.close(fd)
        self.channel.close()
        self._theirs.close()
        self.sock.close()
