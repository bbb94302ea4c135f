# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostzero.errors import ConnectionLost, DeviceError, VhostUserError
from hostzero.ram import GuestMemory, MemoryRegion, Ram, open_ram
from hostzero.units import Gpa
from hostzero.vhost_user.frontend import NOTIFICATIONS_MAX, QUEUE_SIZE_MAX, USER_BASE, VhostUserTransport
from hostzero.vhost_user.frontend_session import FrontEndSession
from hostzero.virtio.ring_layout import RingLayout
from hostzero.virtio.transport import Status, Transport
from tests.vhost_user.at_once import at_once
from tests.vhost_user.scripted_backend import BIT_30, ScriptedBackend

SECONDS = 20.0
LOW, HIGH = 4 << 20, 2 << 20
HIGH_AT = 4 << 30
STARTED = Status.ACKNOWLEDGE | Status.DRIVER
READY = STARTED | Status.FEATURES_OK


@pytest.fixture
def ram() -> Iterator[Ram]:
    with open_ram(LOW + HIGH, "memfd") as ram:
        yield ram


@pytest.fixture
def memory(ram: Ram) -> GuestMemory:
    return GuestMemory([MemoryRegion(Gpa(0), ram, 0, LOW), MemoryRegion(Gpa(HIGH_AT), ram, LOW, HIGH)])


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
def transport(backend: ScriptedBackend, memory: GuestMemory) -> Iterator[VhostUserTransport]:
    session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
    session.greet()
    with VhostUserTransport(session, memory) as transport:
        yield transport


def start(transport: VhostUserTransport, queues: int = 2) -> list[list[int]]:
    """Bring two queues up; return the interrupts of each, a list that grows."""
    transport.set_status(int(Status.ACKNOWLEDGE))
    transport.set_status(int(STARTED))
    transport.set_driver_features(0x1_00000020)
    transport.set_status(int(READY))
    interrupts: list[list[int]] = [[] for _ in range(queues)]
    for index in range(queues):
        layout = RingLayout.contiguous(transport.memory, 16, Gpa(0x10000 * (index + 1)))
        transport.setup_queue(index, layout, lambda index=index: interrupts[index].append(1))  # type: ignore[misc]
    transport.set_status(int(READY | Status.DRIVER_OK))
    return interrupts


def test_it_is_a_transport(transport: VhostUserTransport) -> None:
    assert isinstance(transport, Transport)


def test_a_driver_sees_no_bit_of_the_protocol(transport: VhostUserTransport) -> None:
    assert transport.device_features() == 0x1_200000FF


def test_features_are_sent_with_features_ok(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    transport.set_status(int(STARTED))
    transport.set_driver_features(0x1_00000020)
    assert 2 not in backend.requests()
    transport.set_status(int(READY))
    assert backend.heard[-1].request == 2
    assert backend.heard[-1].number == 0x1_00000020 | BIT_30
    assert transport.status() == READY


def test_refused_features_leave_features_ok_clear(
    transport: VhostUserTransport, backend: ScriptedBackend
) -> None:
    backend.results[2] = 1
    transport.set_status(int(STARTED))
    transport.set_driver_features(1 << 23)
    transport.set_status(int(READY))
    assert transport.status() == STARTED


def test_driver_ok_hands_over_memory_and_rings(
    transport: VhostUserTransport, backend: ScriptedBackend, ram: Ram
) -> None:
    start(transport)
    begun = backend.requests().index(5)
    ring = [8, 10, 9, 14, 13, 12]
    assert backend.requests()[begun:] == [5, *ring, *ring, 18, 18]
    table = backend.heard[begun].payload
    assert struct.unpack("=II8Q", table) == (
        *(2, 0),
        *(0, LOW, USER_BASE, 0),
        *(HIGH_AT, HIGH, USER_BASE + HIGH_AT, LOW),
    )
    assert os.fstat(backend.fds[0]).st_ino == os.fstat(ram.fileno or -1).st_ino
    size, base, addr = backend.heard[begun + 1 : begun + 4]
    assert struct.unpack("=II", size.payload) == (0, 16)
    assert struct.unpack("=II", base.payload) == (0, 0)
    layout = RingLayout.contiguous(transport.memory, 16, Gpa(0x10000))
    assert struct.unpack("=IIQQQQ", addr.payload) == (
        *(0, 0),
        *(USER_BASE + layout.desc, USER_BASE + layout.used, USER_BASE + layout.avail, 0),
    )
    assert [heard.number for heard in backend.heard[begun + 10 : begun + 13]] == [1, 1, 1]


def test_notifications_in_both_directions(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    interrupts = start(transport)
    # After the two of the memory table: ERR, CALL, KICK of queue 0, then of queue 1.
    _, call, kick, *_ = backend.fds[2:]
    transport.notify(0)
    assert os.eventfd_read(kick) == 1
    os.eventfd_write(call, 1)
    os.eventfd_write(call, 2)
    assert transport.wait(SECONDS)
    assert interrupts == [[1, 1, 1], []]
    assert not transport.wait(0)


def test_a_flood_of_notifications_has_an_end(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    interrupts = start(transport)
    os.eventfd_write(backend.fds[3], 1 << 40)
    transport.wait(SECONDS)
    assert len(interrupts[0]) == NOTIFICATIONS_MAX


@pytest.mark.parametrize("blocked", ["kick", "call"])
def test_a_backend_that_makes_the_descriptors_blocking_stops_nothing(
    transport: VhostUserTransport, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    start(transport)
    _, call, kick, *_ = backend.fds[2:]
    os.eventfd_write(kick, (1 << 64) - 2)
    for fd in (call, kick):
        os.set_blocking(fd, True)
    # As if the backend had taken its own notification back once this end had seen it.
    monkeypatch.setattr(select, "select", lambda *_: ([transport._queues[0].call], [], []))
    at_once(lambda: transport.notify(0) if blocked == "kick" else transport.wait(0))
    monkeypatch.undo()


def test_a_broken_ring_reads_as_needs_reset_until_the_reset(
    transport: VhostUserTransport, backend: ScriptedBackend
) -> None:
    start(transport)
    os.eventfd_write(backend.fds[2], 1)
    assert transport.status() & Status.NEEDS_RESET
    transport.set_status(0)
    assert transport.status() == 0


def test_a_reset_stops_every_ring_and_then_the_device(
    transport: VhostUserTransport, backend: ScriptedBackend
) -> None:
    start(transport)
    before = len(backend.heard)
    transport.set_status(0)
    assert backend.requests()[before:] == [18, 18, 11, 11, 34]
    assert transport.status() == 0
    start(transport)
    assert transport.status() == READY | Status.DRIVER_OK


def test_the_configuration_space(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    backend.config[0:4] = b"\5\0\0\0"
    assert transport.read_config(0, 4) == b"\5\0\0\0"
    transport.write_config(4, b"\1\2\3\4")
    assert backend.heard[-1].request == 25
    assert backend.heard[-1].payload == struct.pack("=III", 4, 4, 0) + b"\1\2\3\4"


def test_refused_reads_and_writes(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    backend.results[25] = 1
    with pytest.raises(DeviceError, match="refuses SET_CONFIG"):
        transport.write_config(4, b"\1\2\3\4")
    backend.answers[24] = lambda heard: heard.payload[:4] + struct.pack("=II", 4, 0) + bytes(4)
    with pytest.raises(DeviceError, match="refuses 8 bytes"):
        transport.read_config(0, 8)


def test_queues_are_those_of_the_backend(transport: VhostUserTransport) -> None:
    assert [transport.queue_size_max(index) for index in (-1, 0, 4, 5)] == [
        0,
        QUEUE_SIZE_MAX,
        QUEUE_SIZE_MAX,
        0,
    ]
    layout = RingLayout.contiguous(transport.memory, 16, Gpa(0x10000))
    with pytest.raises(DeviceError, match="no such queue"):
        transport.setup_queue(5, layout, lambda: None)
    transport.setup_queue(0, layout, lambda: None)
    with pytest.raises(DeviceError, match="set up already"):
        transport.setup_queue(0, layout, lambda: None)


def test_a_backend_that_goes_away(transport: VhostUserTransport, backend: ScriptedBackend) -> None:
    start(transport)
    backend.hang_up()
    with pytest.raises(ConnectionLost):
        transport.wait(SECONDS)


def test_memory_without_a_file_is_refused(backend: ScriptedBackend) -> None:
    session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
    session.greet()
    with open_ram(LOW, "anonymous") as ram, pytest.raises(VhostUserError, match="without a file"):
        VhostUserTransport(session, GuestMemory.whole(ram))
    session.close()


def test_descriptors_are_closed(backend: ScriptedBackend, memory: GuestMemory) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
    session.greet()
    with VhostUserTransport(session, memory) as transport:
        before = count() - len(backend.fds)
        for _ in range(5):
            start(transport)
            transport.set_status(0)
        assert count() - len(backend.fds) == before
        start(transport)
    transport.close()
    # The session's own socket and its end of the channel are gone as well.
    assert count() - len(backend.fds) == before - 2


def test_nobody_listens(tmp_path: Path, memory: GuestMemory) -> None:
    with pytest.raises(FileNotFoundError):
        VhostUserTransport.connect(str(tmp_path / "nobody.sock"), memory, SECONDS, time.monotonic)
