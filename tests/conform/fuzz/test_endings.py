# SPDX-License-Identifier: GPL-2.0-only
"""Each bad end is what it says, and after each the connection is closed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from hostzero.conform.fuzz import endings
from hostzero.conform.fuzz.endings import ENDS, end, intrude
from hostzero.conform.fuzz.peer import Log, Peer
from hostzero.vhost_user.messages import FLAG_REPLY, HEADER, PAYLOAD_MAX, VERSION, VERSION_MASK
from hostzero.vhost_user.protocol import Request
from tests.conform.fuzz.fakes import Looks, connected, open_files

SEEDS = range(12)


def read_all(backend: socket.socket) -> tuple[bytes, list[int]]:
    """Everything up to the end, and how many descriptors came with each part."""
    data = b""
    counts: list[int] = []
    while True:
        try:
            part, fds, _, _ = socket.recv_fds(backend, 1 << 16, 253)
        except ConnectionResetError:  # the other end has left answers unread
            return data, counts
        for fd in fds:
            os.close(fd)
        if not part:
            return data, counts
        data += part
        counts.append(len(fds))


def ended(kind: str, seed: int, folder: Path) -> tuple[bytes, list[int], Looks, str]:
    """What a backend gets of one end."""
    watch = Looks()
    with connected(folder) as (peer, backend), ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, backend)
        with contextlib.closing(peer):
            text = ENDS[kind][1](Random(seed), peer, watch)
        data, counts = reading.result()
    (folder / "peer.sock").unlink()
    return data, counts, watch, text


def header(data: bytes) -> tuple[int, int, int]:
    request, flags, size = HEADER.unpack_from(data)
    return request, flags, size


@pytest.mark.parametrize("kind", [kind for kind in ENDS if kind != "end: unread"])
def test_an_end_comes_again_with_its_seed(kind: str, tmp_path: Path) -> None:
    first, second = ended(kind, 5, tmp_path), ended(kind, 5, tmp_path)
    assert (first[0], sum(first[1]), first[3]) == (second[0], sum(second[1]), second[3])


def test_another_version(tmp_path: Path) -> None:
    seen = set()
    for seed in SEEDS:
        data, _, _, text = ended("end: version", seed, tmp_path)
        _, flags, size = header(data)
        assert size == len(data) - HEADER.size == 0
        assert text == f"version {flags}"
        seen.add(flags & VERSION_MASK)
    assert seen == {0, 2, 3}


def test_a_reply_where_a_request_is_due(tmp_path: Path) -> None:
    data, _, _, _ = ended("end: reply", 1, tmp_path)
    assert data == HEADER.pack(Request.SET_OWNER, VERSION | FLAG_REPLY, 0)


def test_a_payload_that_is_too_large(tmp_path: Path) -> None:
    sizes = {header(ended("end: size", seed, tmp_path)[0])[2] for seed in SEEDS}
    assert min(sizes) == PAYLOAD_MAX + 1
    assert max(sizes) == (1 << 32) - 1


def test_random_bytes(tmp_path: Path) -> None:
    sent = [ended("end: garbage", seed, tmp_path)[0] for seed in SEEDS]
    assert {len(data) for data in sent} >= {1, HEADER.size - 1, HEADER.size, HEADER.size + 1}
    assert len(set(sent)) > 6


def test_a_message_that_is_cut_short(tmp_path: Path) -> None:
    cuts, fds = set(), set()
    for seed in range(150):
        data, counts, watch, text = ended("end: cut short", seed, tmp_path)
        assert text == f"{len(data)} bytes of a message"
        assert watch.looks == ["fresh status"]
        cuts.add(len(data))
        fds.add(sum(counts))
    assert min(cuts) < HEADER.size <= max(cuts) < HEADER.size + 40
    assert {0, 7} <= fds


def test_a_hoard_of_descriptors(tmp_path: Path) -> None:
    data, counts, watch, text = ended("end: descriptors", 1, tmp_path)
    assert text == f"{len(data)} bytes with 9 descriptors each"
    assert counts == [9] * len(data)
    assert len(data) < HEADER.size + header(data)[2]  # it is never whole
    assert watch.looks == ["fresh status", "busy"]


def test_answers_that_nobody_reads(tmp_path: Path) -> None:
    with connected(tmp_path) as (peer, backend):
        watch = Looks()
        asked = threading.Event()

        def answer() -> int:
            count = 0
            backend.settimeout(None)
            with contextlib.suppress(OSError):
                while backend.recv(HEADER.size + 268, socket.MSG_WAITALL):
                    backend.sendall(bytes(HEADER.size + 268))
                    count += 1
                    asked.set()
            return count

        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(answer)
            with contextlib.closing(peer):
                ENDS["end: unread"][1](Random(1), peer, watch)
                asked.wait(30)
            assert answering.result() > 0
    assert watch.looks == ["fresh status"]


def test_half_a_connection(tmp_path: Path) -> None:
    with connected(tmp_path) as (peer, backend):
        ENDS["end: half closed"][1](Random(1), peer, Looks())
        assert backend.recv(64) == HEADER.pack(Request.GET_QUEUE_NUM, VERSION, 0)
        assert backend.recv(64) == b""
        backend.send(b"answer")
        assert peer.sock.recv(64) == b"answer"


def test_nothing_more(tmp_path: Path) -> None:
    assert ended("end: closed", 1, tmp_path)[0] == b""


# ---------------------------------------------------------------------------- whichever is drawn


def test_every_end_is_drawn_told_and_closed(tmp_path: Path) -> None:
    log = Log()
    for seed in range(80):
        with connected(tmp_path) as (peer, backend), ThreadPoolExecutor(1) as pool:
            peer.log = log
            reading = pool.submit(read_all, backend)
            end(Random(seed), peer, Looks())
            reading.result()  # it has come to an end
            assert peer.sock.fileno() < 0
        assert not log.last[-1].endswith("...")
        (tmp_path / "peer.sock").unlink()
    assert set(log.done) == set(ENDS)
    assert log.done.most_common(1)[0][0] == "end: closed"


def test_a_backend_that_was_quicker_is_none_the_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "ENDS", {"end: garbage": ENDS["end: garbage"]})
    with connected(tmp_path) as (peer, backend):
        backend.close()
        end(Random(1), peer, Looks())
        assert peer.log.answers == {"ended": 1}
        assert peer.log.last[-1] == "end: garbage: ..."


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(8)
        yield listener


def test_a_second_front_end_says_something_and_leaves(tmp_path: Path) -> None:
    with listening(tmp_path / "sock") as listener:
        peer = Peer(tmp_path / "sock", Log())
        listener.accept()[0].close()
        sizes = set()
        for seed in SEEDS:
            intrude(Random(seed), tmp_path / "sock", peer)
            with listener.accept()[0] as second:
                sizes.add(len(read_all(second)[0]))
        assert sizes == {0, 1, 12, 4096}
        assert peer.log.done == {"second front end": len(SEEDS)}
        peer.close()


def test_nobody_has_to_be_there_for_a_second_one(tmp_path: Path) -> None:
    with connected(tmp_path) as (peer, _):
        before = open_files()
        intrude(Random(1), tmp_path / "none", peer)
        assert open_files() == before
