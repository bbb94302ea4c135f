# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hostzero.conform.fuzz import peer as peer_module
from hostzero.conform.fuzz.finding import Ended, Found, Kind
from hostzero.conform.fuzz.peer import LAST_MAX, Log, Peer
from hostzero.vhost_user.messages import FLAG_NEED_REPLY, FLAG_REPLY, HEADER, VERSION
from hostzero.vhost_user.protocol import Request, name_of
from tests.conform.fuzz.fakes import connected, open_files


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "PATIENCE", 0.2)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Peer, socket.socket]]:
    with connected(tmp_path) as both:
        yield both


def reply(request: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload


def received(backend: socket.socket) -> tuple[tuple[int, int, int], bytes]:
    header = HEADER.unpack(backend.recv(HEADER.size, socket.MSG_WAITALL))
    return header, backend.recv(header[2], socket.MSG_WAITALL) if header[2] else b""


def found(call: Any, *arguments: Any) -> tuple[Kind, str]:
    with pytest.raises(Found) as caught:
        call(*arguments)
    return caught.value.kind, str(caught.value)


# ---------------------------------------------------------------------------- what was done


def test_a_log_counts_all_and_tells_the_last() -> None:
    log = Log()
    for step in range(LAST_MAX + 5):
        log.note("even" if step % 2 == 0 else "odd", str(step))
    assert log.steps == LAST_MAX + 5
    assert log.done == {"even": (LAST_MAX + 6) // 2, "odd": (LAST_MAX + 5) // 2}
    assert len(log.last) == LAST_MAX
    assert (log.last[0], log.last[-1]) == ("odd: 5", f"even: {LAST_MAX + 4}")


# ---------------------------------------------------------------------------- connecting and sending


def test_nobody_listens(tmp_path: Path) -> None:
    before = open_files()
    kind, text = found(Peer, tmp_path / "none", Log())
    assert kind is Kind.DIED
    assert text == "cannot connect any more: No such file or directory"
    assert open_files() == before


@contextlib.contextmanager
def crowded(path: Path) -> Iterator[socket.socket]:
    """A backend at which as many wait to be accepted as may."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sock.setblocking(False)
                sock.connect(str(path))
        yield listener


def test_a_connection_waits_until_others_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crowded(tmp_path / "sock") as listener:
        waits = 0

        def accept(_seconds: float) -> None:
            nonlocal waits
            waits += 1
            listener.accept()[0].close()

        monkeypatch.setattr("hostzero.conform.fuzz.peer.time.sleep", accept)
        Peer(tmp_path / "sock", Log()).close()
        assert waits == 1


def test_but_not_for_ever(tmp_path: Path, impatient: None) -> None:
    with crowded(tmp_path / "sock"):
        assert found(Peer, tmp_path / "sock", Log()) == (Kind.SILENT, "no connection is accepted in 0.2 s")


def test_a_message_has_the_header_that_it_is_given(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    peer.send(Request.SET_OWNER)
    peer.send((1 << 32) + 7, b"abc", flags=0x1F3)
    peer.send(Request.SET_CONFIG, b"abc", size=1 << 31)
    assert received(backend) == ((Request.SET_OWNER, VERSION, 0), b"")
    assert received(backend) == ((7, 0x1F3, 3), b"abc")
    assert backend.recv(64) == HEADER.pack(Request.SET_CONFIG, VERSION, 1 << 31) + b"abc"


def test_descriptors_come_with_the_first_byte_and_once(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    sent = Random(1).randbytes(4 << 20)
    with Path("/dev/null").open() as one, Path("/dev/zero").open() as two:
        sending = threading.Thread(target=peer.send_raw, args=(sent, [one.fileno(), two.fileno()]))
        sending.start()
        data, fds, _, _ = socket.recv_fds(backend, 1, 8)
        names = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in fds]
        for fd in fds:
            os.close(fd)
        while len(data) < len(sent):
            part, fds, _, _ = socket.recv_fds(backend, 1 << 20, 8)
            assert fds == []
            data += part
        sending.join()
    assert names == ["/dev/null", "/dev/zero"]
    assert data == sent


def test_a_backend_that_has_closed(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.close()
    for call in (lambda: peer.send(Request.SET_OWNER), peer.sync, lambda: peer.ask(Request.GET_FEATURES)):
        with pytest.raises(Ended):
            call()


def test_a_backend_that_closes_within_a_reply(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.GET_FEATURES, bytes(8))[:-1])
    backend.shutdown(socket.SHUT_WR)
    with pytest.raises(Ended):
        peer.sync()


def test_a_backend_that_resets_the_connection(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    peer.send(Request.SET_OWNER)
    backend.close()  # with something unread
    with pytest.raises(Ended):
        peer._exactly(1)


def test_a_backend_that_reads_nothing_any_more(impatient: None, ends: tuple[Peer, socket.socket]) -> None:
    peer, _ = ends
    assert found(peer.send_raw, bytes(64 << 20)) == (
        Kind.SILENT,
        "the backend reads nothing from its socket any more",
    )


class Full:
    """A socket in front of which the kernel counts too many descriptors, the first times."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self.sock = sock
        self.times = times

    def sendmsg(self, *arguments: Any) -> int:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return self.sock.sendmsg(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


def test_too_many_descriptors_under_way_are_no_end(
    ends: tuple[Peer, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, backend = ends
    monkeypatch.setattr(peer, "sock", Full(peer.sock, 3))
    peer.send_raw(b"x", [0])
    data, fds, _, _ = socket.recv_fds(backend, 8, 8)
    assert (data, len(fds)) == (b"x", 1)
    os.close(fds[0])


def test_but_for_ever_they_are_silence(
    impatient: None, ends: tuple[Peer, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, _ = ends
    monkeypatch.setattr(peer, "sock", Full(peer.sock, 1 << 60))
    assert found(peer.send_raw, b"x", [0])[0] is Kind.SILENT


# ---------------------------------------------------------------------------- answers


def test_the_mark_sorts_what_came_before_it(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.SET_CONFIG) + reply(Request.SET_OWNER, bytes(8)) * 2)
    backend.send(reply(Request.SET_OWNER, struct.pack("=Q", 1)) + reply(Request.GET_CONFIG, bytes(20)))
    backend.send(reply(Request.GET_FEATURES, struct.pack("=Q", 5)) + reply(Request.SET_OWNER, bytes(8)))
    peer.sync()
    assert peer.log.answers == {"nothing": 1, "success": 2, "other": 2}
    assert received(backend) == ((Request.GET_FEATURES, VERSION, 0), b"")


def test_a_backend_that_does_not_answer(impatient: None, ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.SET_OWNER, bytes(8)))
    assert found(peer.sync) == (Kind.SILENT, "no answer on the vhost-user socket in 0.2 s")


def test_what_has_to_succeed_is_acknowledged(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    peer.acknowledges = True
    backend.send(reply(Request.SET_OWNER, bytes(8)))
    peer.tell(Request.SET_OWNER, b"abc")
    assert received(backend) == ((Request.SET_OWNER, VERSION | FLAG_NEED_REPLY, 3), b"abc")


@pytest.mark.parametrize("payload", [struct.pack("=Q", 1), b"", bytes(4), bytes(9)])
def test_anything_but_success_is_a_refusal(ends: tuple[Peer, socket.socket], payload: bytes) -> None:
    peer, backend = ends
    peer.acknowledges = True
    backend.send(reply(Request.SET_OWNER, payload))
    why = f"{name_of(Request.SET_OWNER)}, which is well-formed, is refused: {payload.hex()}"
    assert found(peer.tell, Request.SET_OWNER) == (Kind.REFUSED, why)


def test_an_answer_to_something_else(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    peer.acknowledges = True
    backend.send(reply(Request.SET_VRING_NUM, bytes(8)) + reply(Request.GET_CONFIG, bytes(8)))
    assert found(peer.tell, Request.SET_OWNER) == (
        Kind.SILENT,
        f"the answer to {name_of(Request.SET_OWNER)} is one to {name_of(Request.SET_VRING_NUM)}",
    )
    assert found(peer.ask, Request.GET_QUEUE_NUM) == (
        Kind.SILENT,
        f"the answer to {name_of(Request.GET_QUEUE_NUM)} is one to {name_of(Request.GET_CONFIG)}",
    )


def test_without_acknowledgements_the_mark_follows(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.GET_FEATURES, bytes(8)))
    peer.tell(Request.SET_OWNER, b"abc")
    assert received(backend) == ((Request.SET_OWNER, VERSION, 3), b"abc")
    assert received(backend) == ((Request.GET_FEATURES, VERSION, 0), b"")


def test_what_was_asked_is_returned(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.GET_CONFIG, b"values"))
    assert peer.ask(Request.GET_CONFIG, b"which") == b"values"
    assert received(backend) == ((Request.GET_CONFIG, VERSION, 5), b"which")


def test_a_number_is_one_of_eight_bytes(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    backend.send(reply(Request.GET_QUEUE_NUM, struct.pack("=Q", 1 << 40)))
    assert peer.number(Request.GET_QUEUE_NUM) == 1 << 40
    backend.send(reply(Request.GET_QUEUE_NUM, b"") + reply(Request.GET_QUEUE_NUM, bytes(9)))
    for size in (0, 9):
        why = f"{name_of(Request.GET_QUEUE_NUM)} is answered by {size} bytes, not a number"
        assert found(peer.number, Request.GET_QUEUE_NUM) == (Kind.REFUSED, why)


def test_closing_twice_is_closing(ends: tuple[Peer, socket.socket]) -> None:
    peer, backend = ends
    peer.close()
    peer.close()
    assert backend.recv(1) == b""
