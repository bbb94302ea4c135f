# SPDX-License-Identifier: GPL-2.0-only
"""Messages over a socket pair: in pieces, with descriptors, and peers that go away."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.connection import CLOSED, Connection, Fd, Message, Peer
from hostzero.vhost_user.messages import FDS_MAX, FLAG_NEED_REPLY, Header
from tests.vhost_user.at_once import at_once
from tests.vhost_user.backend import null_fd, open_fds
from tests.vhost_user.front_end import header


class Ends:
    """Two connections; the near one does not block."""

    def __init__(self) -> None:
        near, self.far_sock = socket.socketpair()
        near.setblocking(False)
        self.far_sock.settimeout(10)
        self.near = Connection(near)
        self.far = Connection(self.far_sock)

    def receive(self) -> Message:
        message = self.near.receive()
        assert message is not None
        return message


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.near.close()
    both.far.close()


def test_a_message_arrives_whole(ends: Ends) -> None:
    ends.far.send(5, b"payload", flags=FLAG_NEED_REPLY)
    with ends.receive() as message:
        assert message.header == Header(5, 1 | FLAG_NEED_REPLY, 7)
        assert message.payload == b"payload"
        assert message.fds == []
    assert ends.near.receive() is None


def test_a_message_in_pieces_of_one_byte(ends: Ends) -> None:
    for byte in header(5, 3) + b"ab":
        ends.far_sock.send(bytes([byte]))
        assert ends.near.receive() is None
    ends.far_sock.send(b"c")
    assert ends.receive().payload == b"abc"


def test_messages_one_behind_the_other(ends: Ends) -> None:
    ends.far_sock.send(header(1, 0) + header(2, 2) + b"xy" + header(3, 0)[:5])
    assert ends.receive().header.request == 1
    assert ends.receive().payload == b"xy"
    assert ends.near.receive() is None
    ends.far_sock.send(header(3, 0)[5:])
    assert ends.receive().header.request == 3


def test_descriptors_belong_to_the_message_with_whose_bytes_they_came(ends: Ends) -> None:
    read, write = os.pipe()
    ends.far.send(1, b"one", fds=[write])
    ends.far.send(2, b"two")
    ends.far.send(3, b"three", fds=[read, write])
    counts = []
    for _ in range(3):
        with ends.receive() as message:
            counts.append(len(message.fds))
    os.close(read)
    os.close(write)
    assert counts == [1, 0, 2]


def test_a_descriptor_with_a_later_piece_of_a_message_belongs_to_it(ends: Ends) -> None:
    fd = null_fd()
    ends.far_sock.send(header(1, 4)[:6])
    socket.send_fds(ends.far_sock, [header(1, 4)[6:] + b"ab"], [fd])
    assert ends.near.receive() is None
    socket.send_fds(ends.far_sock, [b"cd"], [fd])
    with ends.receive() as message:
        assert len(message.fds) == 2
    os.close(fd)


def test_a_received_descriptor_is_the_senders_file_and_closes_on_exec(ends: Ends) -> None:
    fd = os.memfd_create("sent")
    ends.far.send(1, fds=[fd])
    with ends.receive() as message:
        (received,) = message.fds
        assert os.path.sameopenfile(received.fileno(), fd)
        assert not os.get_inheritable(received.fileno())
    os.close(fd)


@pytest.mark.parametrize("count", [FDS_MAX + 1, FDS_MAX + 2, 100, 253])
def test_too_many_descriptors_cost_their_message_and_are_closed(ends: Ends, count: int) -> None:
    fd = null_fd()
    before = open_fds().keys()
    ends.far.send(7, b"abc", fds=[fd] * count)
    ends.far.send(8)
    with pytest.raises(MessageError, match="more than 8 descriptors"):
        ends.near.receive()
    assert ends.receive().header.request == 8
    assert open_fds().keys() == before
    os.close(fd)


@pytest.fixture
def lingering() -> Iterator[int]:
    """A TCP socket with unsent data, whose last close waits for an hour."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    yield sock.detach()
    # A reset, which ends a close that waits all the same.
    reader.close()


@pytest.mark.parametrize("others", [0, FDS_MAX, 252])
def test_a_socket_that_lingers_is_closed_without_waiting(ends: Ends, lingering: int, others: int) -> None:
    fd = null_fd()
    ends.far.send(7, fds=[fd] * others + [lingering])
    os.close(lingering)
    os.close(fd)

    def take() -> None:
        with contextlib.suppress(MessageError), ends.receive():
            pass

    at_once(take)


def test_a_connection_over_a_socket_that_lingers_is_closed_without_waiting(lingering: int) -> None:
    at_once(Connection(socket.socket(fileno=lingering)).close)


def test_descriptors_of_a_message_that_never_becomes_whole_are_closed(ends: Ends) -> None:
    fd = null_fd()
    before = len(open_fds())
    socket.send_fds(ends.far_sock, [header(5, 100)], [fd] * 8)
    assert ends.near.receive() is None
    assert len(open_fds()) == before + 8
    ends.near.close()
    assert len(open_fds()) == before - 1
    os.close(fd)


def test_descriptors_on_each_byte_of_a_message_are_never_many(ends: Ends) -> None:
    fd = null_fd()
    before = len(open_fds())
    for byte in header(5, 100):
        socket.send_fds(ends.far_sock, [bytes([byte])], [fd] * FDS_MAX)
        assert ends.near.receive() is None
        assert len(open_fds()) <= before + FDS_MAX
    ends.far_sock.sendall(bytes(100))
    with pytest.raises(MessageError, match="more than 8 descriptors"):
        ends.near.receive()
    # It is that message's mistake alone.
    socket.send_fds(ends.far_sock, [header(6, 0)], [fd])
    with ends.receive() as message:
        assert len(message.fds) == 1
    assert len(open_fds()) == before
    os.close(fd)


def test_the_end_of_the_peer_between_messages_and_in_the_middle(ends: Ends) -> None:
    ends.far.close()
    with pytest.raises(ConnectionLost, match=f"^{CLOSED}$"):
        ends.near.receive()
    other = Ends()
    other.far_sock.send(header(5, 4) + b"ab")
    other.far.close()
    with pytest.raises(ConnectionLost, match="in the middle of a message"):
        other.near.receive()
    other.near.close()


def test_a_peer_that_does_not_read_is_given_up(ends: Ends) -> None:
    def ask_without_end() -> None:
        while True:
            ends.near.send(1, bytes(256))

    with pytest.raises(ConnectionLost, match="does not read"):
        ask_without_end()


def test_a_socket_that_somebody_makes_blocking_again_does_not_wait(ends: Ends) -> None:
    os.set_blocking(ends.near.sock.fileno(), True)
    heard: list[Message | None] = []
    at_once(lambda: heard.append(ends.near.receive()))
    assert heard == [None]


def test_a_peer_that_is_gone_is_named_when_sending(ends: Ends) -> None:
    ends.far.close()
    with pytest.raises(ConnectionLost, match=r"cannot send GET_FEATURES \(1\): Broken pipe"):
        ends.near.send(1)


def test_a_blocking_socket_waits_and_its_timeout_is_passed_on(ends: Ends) -> None:
    ends.near.reply(1, b"12345678")
    message = ends.far.receive(reply=True)
    assert message is not None
    assert message.payload == b"12345678"
    ends.far_sock.settimeout(0.01)
    with pytest.raises(TimeoutError):
        ends.far.receive(reply=True)


def test_a_connection_closes_with_its_context() -> None:
    near, far = socket.socketpair()
    with far, Connection(near) as connection:
        assert not connection.closed
    assert connection.closed


def test_a_descriptor_is_closed_once() -> None:
    number = null_fd()
    fd = Fd(number)
    with fd:
        assert fd.fileno() == number
        assert not fd.closed
    again = null_fd()
    assert again == number, "the number is in use again"
    fd.close()
    assert fd.closed
    os.close(again)
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


def test_a_detached_descriptor_stays_open() -> None:
    fd = Fd(null_fd())
    number = fd.detach()
    fd.close()
    os.close(number)


def test_a_message_closes_what_nobody_took() -> None:
    first, second = null_fd(), null_fd()
    with Message(Header(1, 1, 0), b"", [Fd(first), Fd(second)]) as message:
        taken = message.fds.pop()
    assert first not in open_fds()
    assert second in open_fds()
    taken.close()


def test_who_is_at_the_other_end() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert Peer.of(near) == (os.getpid(), os.getuid(), os.getgid())
