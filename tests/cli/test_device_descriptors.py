# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero device`` serves a thousand front ends, most of them bad, and no descriptor leaks.

Each kind of session is a function of a front end that has connected; when it returns, the front end
leaves without a word. It has to send descriptors that the device could forget, and to see that the
device took the message as it was meant. `turn` says how often that kind was there before, for what
differs from time to time.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostzero.device import DEFAULT_FEATURES
from hostzero.units import PMD_SIZE
from hostzero.vhost_user.control_client import ControlClient
from hostzero.virtio.features import Feature
from tests.conform.backend import Backend, running
from tests.vhost_user.backend import null_fd
from tests.vhost_user.front_end import (
    HIGH_BYTES,
    HIGH_GPA,
    LOW_BYTES,
    PROTOCOL,
    QUEUES,
    RAM_BYTES,
    USER,
    USER_HIGH,
    FrontEnd,
    Memory,
    header,
)

SESSIONS = 1_000
LOOKS_MAX = 10_000
"""Looks at the device, one after the other, after which a session does not end any more."""

TABLE, KICK, CALL, ERR, CHANNEL = 5, 12, 13, 14, 21
"""The requests that carry descriptors."""
Carrier = tuple[int, bytes, list[int]]


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(struct.pack("=4Q", *region) for region in regions)


def carriers(front_end: FrontEnd) -> list[Carrier]:
    """Every request that carries descriptors, as it should be."""
    memory = front_end.memory
    return [
        (TABLE, memory.table(), [memory.fd, memory.fd]),
        (KICK, u64(0), front_end.kicks[:1]),
        (CALL, u64(0), front_end.calls[:1]),
        (ERR, u64(0), front_end.errs[:1]),
        (CHANNEL, b"", [front_end.channel.fileno()]),
    ]


# ------------------------------------------------------------- kinds of sessions


def says_nothing(front_end: FrontEnd, turn: int) -> None:
    pass


def leaves_while_rings_run(front_end: FrontEnd, turn: int) -> None:
    front_end.start(DEFAULT_FEATURES)
    assert front_end.report((4 * PMD_SIZE, PMD_SIZE)) == PMD_SIZE


def stops_before_it_leaves(front_end: FrontEnd, turn: int) -> None:
    front_end.start(DEFAULT_FEATURES)
    front_end.stop()
    front_end.do(34 if turn % 2 else 4)


def gives_everything_again(front_end: FrontEnd, turn: int) -> None:
    """While rings run, and once more after they were stopped."""
    front_end.start(DEFAULT_FEATURES)
    for _ in range(2):
        for request, payload, fds in carriers(front_end):
            front_end.do(request, payload, fds)
        front_end.vring_fd(CALL, 0, None)
        front_end.vring_fd(ERR, 0, None)
        front_end.stop()


def leaves_within_a_message(front_end: FrontEnd, turn: int) -> None:
    """Of every kind and at any byte; now and then there are descriptors with a second piece."""
    request, payload, fds = carriers(front_end)[turn % 5]
    data = header(request, len(payload) or 8) + payload
    end = 1 + turn * 5 % (len(data) - 1)
    start = end // 2 if turn % 2 else 0
    if start:
        front_end.send_raw(data[:start], fds)
    front_end.send_raw(data[start:end], fds)


def breaks_the_framing(front_end: FrontEnd, turn: int) -> None:
    request, payload, fds = carriers(front_end)[turn % 5]
    broken = (header(request, 8, 2), header(request, 8, 5), header(request, 4097))[turn % 3]
    front_end.send_raw(broken + payload, fds)
    with pytest.raises((EOFError, ConnectionResetError)):  # a reset: what it did not read
        front_end.receive()


def sends_what_is_malformed(front_end: FrontEnd, turn: int) -> None:
    front_end.connect()
    for request, payload, fds in carriers(front_end):
        assert front_end.ack(request, payload + b"\0", fds) == 1
        assert front_end.ack(request, payload[:-1] or b"\0", fds) == 1
    for request, eventfd in (
        (KICK, front_end.kicks[0]),
        (CALL, front_end.calls[0]),
        (ERR, front_end.errs[0]),
    ):
        assert front_end.ack(request, u64(QUEUES), [eventfd]) == 1
        assert front_end.ack(request, u64(1 << 9), [eventfd]) == 1


def sends_a_table_that_cannot_be_mapped(front_end: FrontEnd, turn: int) -> None:
    front_end.start(DEFAULT_FEATURES)
    low, memory = (0, LOW_BYTES, USER, 0), front_end.memory.fd
    for second in (
        (HIGH_GPA, HIGH_BYTES, USER_HIGH, RAM_BYTES),  # beyond the end of its file
        (HIGH_GPA, HIGH_BYTES, USER_HIGH, 0),  # the same bytes of the file
        (HIGH_GPA, HIGH_BYTES, USER, LOW_BYTES),  # the same addresses of the front end
        (0, HIGH_BYTES, USER_HIGH, LOW_BYTES),  # the same memory of the guest
        (HIGH_GPA, HIGH_BYTES - 1, USER_HIGH, LOW_BYTES),  # not whole pages
    ):
        assert front_end.ack(TABLE, table(low, second), [memory, memory]) == 1
    # A table that can be mapped, but the rings that run do not lie in it.
    assert front_end.ack(TABLE, table((HIGH_GPA, HIGH_BYTES, USER_HIGH, LOW_BYTES)), [memory]) == 1


def kicks_rings_that_cannot_start(front_end: FrontEnd, turn: int) -> None:
    """They are enabled, and miss a description or, behind the first two, a role."""
    front_end.connect()
    front_end.negotiate(DEFAULT_FEATURES)
    front_end.make_rings()
    front_end.negotiate(Feature(0))
    front_end.enable()
    for index, kick in enumerate(front_end.kicks):
        assert front_end.ack(KICK, u64(index), [kick]) == 1
    front_end.share()
    for index, ring in enumerate(front_end.rings.values()):
        layout = ring.layout
        front_end.vring(8, index, layout.size)
        addresses = (USER + layout.desc, USER + layout.used, USER + layout.avail, 0)
        front_end.do(9, struct.pack("=IIQQQQ", index, 0, *addresses))
    for index, kick in enumerate(front_end.kicks):
        front_end.vring(18, index, 1)
        assert front_end.ack(KICK, u64(index), [kick]) == (index > 1)


def sends_descriptors_of_another_type(front_end: FrontEnd, turn: int) -> None:
    front_end.connect()
    datagrams, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    null, folder = null_fd(), os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    with datagrams, others:
        for request, payload, fds in carriers(front_end):
            for fd in (null, folder, datagrams.fileno()):
                assert front_end.ack(request, payload, [fd] * len(fds)) == 1
    os.close(null)
    os.close(folder)


def sends_descriptors_too_early(front_end: FrontEnd, turn: int) -> None:
    """Before the owner, what describes rings is not due; without its feature, a channel never is."""
    front_end.send(16, u64(PROTOCOL & ~(1 << 5)))
    for request, payload, fds in carriers(front_end):
        assert front_end.ack(request, payload, fds) == 1


def sends_descriptors_with_any_request(front_end: FrontEnd, turn: int) -> None:
    front_end.connect()
    null = null_fd()
    for request in (3, 34, 99):
        assert front_end.ack(request, b"", [null]) == 1
    assert front_end.ask(1, b"", [null] * 8) == b""
    os.close(null)


def sends_another_number_of_descriptors(front_end: FrontEnd, turn: int) -> None:
    """One too few or too many for the request, or more than any message may have."""
    front_end.connect()
    for request, payload, fds in carriers(front_end):
        for count in (len(fds) - 1, len(fds) + 1, 8, 9, 10, 253):
            assert front_end.ack(request, payload, fds[:1] * count) == 1
    for request, eventfd in (
        (KICK, front_end.kicks[0]),
        (CALL, front_end.calls[0]),
        (ERR, front_end.errs[0]),
    ):
        assert front_end.ack(request, u64(1 << 8), [eventfd]) == 1


def does_not_wait_for_replies(front_end: FrontEnd, turn: int) -> None:
    """The device reads some of it before it finds nobody to reply to."""
    front_end.connect()
    for request, payload, fds in carriers(front_end):
        front_end.send(request, payload, fds)
        front_end.send(1)


def is_not_the_only_one(front_end: FrontEnd, turn: int) -> None:
    front_end.connect()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.settimeout(10)
        other.connect(front_end.sock.getpeername())
        assert other.recv(1) == b""


KINDS: tuple[Callable[[FrontEnd, int], None], ...] = (
    says_nothing,
    leaves_while_rings_run,
    stops_before_it_leaves,
    gives_everything_again,
    leaves_within_a_message,
    breaks_the_framing,
    sends_what_is_malformed,
    sends_a_table_that_cannot_be_mapped,
    kicks_rings_that_cannot_start,
    sends_descriptors_of_another_type,
    sends_descriptors_too_early,
    sends_descriptors_with_any_request,
    sends_another_number_of_descriptors,
    does_not_wait_for_replies,
    is_not_the_only_one,
)


# ------------------------------------------------------------- a thousand of them


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


@contextmanager
def connected(backend: Backend, memory: Memory) -> Iterator[FrontEnd]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(backend.socket))
    front_end = FrontEnd(sock, memory)
    try:
        yield front_end
    finally:
        front_end.close()
        front_end.rings.clear()


def wait_for_the_end(client: ControlClient, sessions: int) -> None:
    """Wait until so many sessions have begun and the last of them is over."""
    for _ in range(LOOKS_MAX):
        status = client.request("status")
        if status["session"] is None and status["metrics"]["vhost_user"]["sessions"] == sessions:
            return
    raise AssertionError(f"session {sessions} does not end")


def descriptors(pid: int) -> dict[int, str]:
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def test_no_descriptor_leaks_in_a_thousand_sessions(tmp_path: Path, memory: Memory) -> None:
    with running(tmp_path) as backend, ControlClient.open(backend.control) as client:
        wait_for_the_end(client, 0)
        pid = backend.process.pid
        before = descriptors(pid)
        for number, kind in zip(range(SESSIONS), itertools.cycle(KINDS)):
            with connected(backend, memory) as front_end:
                kind(front_end, number // len(KINDS))
            wait_for_the_end(client, number + 1)
            assert descriptors(pid) == before, f"session {number + 1}: {kind.__name__}"
        # A mapping keeps a file open as well as a descriptor does.
        assert "memfd:guest" not in Path(f"/proc/{pid}/maps").read_text()
        counted = client.request("metrics")["vhost_user"]
    assert counted["refused_connections"] == SESSIONS // len(KINDS)
    assert counted["errors"].pop("internal") == 0
    assert counted["errors"].pop("features") == 0, "those come without descriptors"
    assert all(counted["errors"].values())
