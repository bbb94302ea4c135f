# SPDX-License-Identifier: GPL-2.0-only
"""What a fuzzer has before it, as threads of the test: a backend, a device, a control socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, StreamRequestHandler, ThreadingUnixStreamServer
from typing import Final

import numpy as np

from hostzero.conform.fuzz.arena import Arena
from hostzero.conform.fuzz.driver import Driver, Queue
from hostzero.conform.fuzz.peer import Log, Peer
from hostzero.conform.fuzz.watch import Watch
from hostzero.ram import libc
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.vhost_user.frontend_session import WANTED
from hostzero.vhost_user.messages import FLAG_NEED_REPLY, FLAG_REPLY, HEADER, VERSION
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, Request
from hostzero.virtio.features import Feature, QueueRole
from hostzero.virtio.mock import MockDevice
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE

EVERYTHING: Final = int(
    Feature.VERSION_1 | Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.REPORTING
) | int(
    Feature.DEVICE_INIT_REPORTED
    | Feature.DEVICE_INIT_ON_INFLATE
    | Feature.PAGE_POISON
    | Feature.MUST_TELL_HOST
)
_PATIENCE: Final = 30.0

Script = Callable[[int, bytes, bool], "bytes | None"]
"""From request, payload and whether an acknowledgement is wanted to the payload of the reply, if any.

`EOFError` closes the connection.
"""
Answer = Callable[[Queue, MockDevice, int], "tuple[int, int] | None"]
"""From a queue, the device's side of its ring and a head to what goes into the used ring, if anything."""


def obliging(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
    """Take everything, and have everything."""
    if request == Request.GET_FEATURES:
        return struct.pack("=Q", EVERYTHING | F_PROTOCOL_FEATURES)
    if request == Request.GET_PROTOCOL_FEATURES:
        return struct.pack("=Q", int(WANTED))
    if request == Request.GET_VRING_BASE:
        return payload
    return bytes(8) if acknowledged else None


@contextlib.contextmanager
def connected(folder: Path) -> Iterator[tuple[Peer, socket.socket]]:
    """Yield a peer and the other end of its connection, at which nobody is."""
    path = folder / "peer.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with contextlib.closing(Peer(path, Log())) as peer:
            backend, _ = listener.accept()
            backend.settimeout(_PATIENCE)
            with backend:
                yield peer, backend


@contextlib.contextmanager
def backend(path: Path, script: Script = obliging) -> Iterator[None]:
    """Answer every connection to `path` by a script, each in a thread of its own."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    request, flags, size = HEADER.unpack(self._exactly(HEADER.size))
                    payload = self._exactly(size)
                    reply = script(request, payload, bool(flags & FLAG_NEED_REPLY))
                    if reply is not None:
                        header = HEADER.pack(request, VERSION | FLAG_REPLY, len(reply))
                        self.request.sendall(header + reply)

        def _exactly(self, size: int) -> bytes:
            data = b""
            while len(data) < size:
                part, fds, _, _ = socket.recv_fds(self.request, size - len(data), 253)
                for fd in fds:
                    os.close(fd)
                if not part:
                    raise EOFError
                data += part
            return data

    with _serving(path, Handler):
        yield


@contextlib.contextmanager
def control(path: Path, answer: Callable[[bytes], bytes]) -> Iterator[None]:
    """Answer every line that comes to `path`; an empty answer closes the connection."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                for line in self.rfile:
                    said = answer(line)
                    if not said:
                        return
                    self.wfile.write(said)

    with _serving(path, Handler):
        yield


def status(**values: object) -> bytes:
    """Return an answer of the control socket."""
    return json.dumps({"version": 1, "ok": True, "result": values}).encode() + b"\n"


@contextlib.contextmanager
def _serving(path: Path, handler: type[BaseRequestHandler]) -> Iterator[None]:
    class Server(ThreadingUnixStreamServer):
        daemon_threads = True  # a client may be connected still

    with Server(str(path), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink()


# ---------------------------------------------------------------------------- a device


def drop(arena: Arena, gpa: int, length: int) -> None:
    """Take a range of guest memory out of the file."""
    for region in arena.table()[0].regions:
        if region.gpa <= gpa < region.gpa + region.size:
            libc.punch_hole(arena.fd, region.mmap_offset + gpa - region.gpa, length)


def honest(arena: Arena) -> Answer:
    """Return what does as it is told, and says so."""

    def answer(queue: Queue, ring: MockDevice, head: int) -> tuple[int, int]:
        first = ring.descriptor(head)
        if queue.role is QueueRole.REPORTING:
            drop(arena, first.addr, first.length)
            return head, first.length
        if queue.role is not QueueRole.INFLATE:
            return head, 0
        for pfn in np.frombuffer(arena.guest.read(Gpa(first.addr), first.length), dtype="<u4").tolist():
            drop(arena, pfn << PAGE_SHIFT, PAGE_SIZE)
        answer = ring.descriptor(first.next)
        if not answer.flags & VIRTQ_DESC_F_WRITE:
            return head, 0
        arena.guest.write(Gpa(answer.addr), b"\xff" * answer.length)
        return head, answer.length

    return answer


@contextlib.contextmanager
def device(driver: Driver, answer: Answer) -> Iterator[None]:
    """Serve the queues of a driver that has started."""
    queues = {queue.kick: queue for queue in driver.queues.values()}
    rings = {kick: MockDevice(queue.ring.memory, queue.ring.layout) for kick, queue in queues.items()}
    ending = os.eventfd(0)

    def serve() -> None:
        while ending not in (kicked := select.select([ending, *queues], [], [])[0]):
            for kick in kicked:
                os.eventfd_read(kick)
                for head in rings[kick].offered():
                    entry = answer(queues[kick], rings[kick], head)
                    if entry is not None:
                        rings[kick].give_back(entry)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(ending, 1)
        thread.join()
        os.close(ending)


def open_files() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until the threads of a backend have closed what they had."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("never")


class Looks(Watch):
    """A watch that sees nothing and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.looks: list[str] = []

    def busy(self) -> None:
        self.looks.append("busy")

    def settled(self) -> None:
        self.looks.append("settled")

    def fresh_status(self) -> None:
        self.looks.append("fresh status")
