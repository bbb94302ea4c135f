# SPDX-License-Identifier: GPL-2.0-only
"""The ways in which a connection can be ended badly."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from random import Random
from typing import Final

from hostzero.conform.fuzz import files
from hostzero.conform.fuzz.finding import Ended
from hostzero.conform.fuzz.peer import Peer
from hostzero.conform.fuzz.watch import Watch
from hostzero.vhost_user.messages import FLAG_REPLY, HEADER, VERSION
from hostzero.vhost_user.protocol import Request


def _version(rng: Random, peer: Peer, watch: Watch) -> str:
    del watch
    flags = rng.choice((0, 2, 3))
    peer.send(Request.GET_QUEUE_NUM, flags=flags)
    return f"version {flags}"


def _reply(rng: Random, peer: Peer, watch: Watch) -> str:
    del rng, watch
    peer.send(Request.SET_OWNER, flags=VERSION | FLAG_REPLY)
    return "a reply to nothing"


def _huge(rng: Random, peer: Peer, watch: Watch) -> str:
    del watch
    size = rng.choice((4097, 1 << 20, (1 << 31) - 1, (1 << 32) - 1))
    peer.send(Request.SET_CONFIG, b"x", size=size)
    return f"a payload of {size} bytes"


def _garbage(rng: Random, peer: Peer, watch: Watch) -> str:
    del watch
    size = rng.choice((1, 11, 12, 13, 4096, 1 << 16))
    peer.send_raw(rng.randbytes(size))
    return f"{size} random bytes"


def _cut(rng: Random, peer: Peer, watch: Watch) -> str:
    data = HEADER.pack(Request.SET_MEM_TABLE, VERSION, 40) + bytes(40)
    length = rng.randrange(1, len(data))
    with files.opened(["eventfd"] * rng.randrange(8)) as fds:
        peer.send_raw(data[:length], fds)
    watch.fresh_status()
    return f"{length} bytes of a message"


def _hoard(rng: Random, peer: Peer, watch: Watch) -> str:
    """A message that is never whole, with descriptors on each byte of it."""
    data = HEADER.pack(Request.SET_CONFIG, VERSION, 4096) + bytes(rng.choice((100, 1000)))
    with files.opened(["eventfd"] * 9) as fds:
        for at in range(len(data)):
            peer.send_raw(data[at : at + 1], fds)
    watch.fresh_status()
    watch.busy()
    return f"{len(data)} bytes with 9 descriptors each"


def _deaf(rng: Random, peer: Peer, watch: Watch) -> str:
    """Questions whose answers nobody reads."""
    del rng
    question = HEADER.pack(Request.GET_CONFIG, VERSION, 268) + struct.pack("=III", 0, 256, 0) + bytes(256)
    peer.sock.setblocking(False)
    try:
        for _ in range(20_000):
            peer.sock.send(question)
    except OSError:
        pass  # the backend has closed, or does not read before it is read from
    watch.fresh_status()
    return "answers that are not read"


def _half(rng: Random, peer: Peer, watch: Watch) -> str:
    """Nothing more to say, and answers wanted all the same."""
    del rng, watch
    peer.send(Request.GET_QUEUE_NUM)
    peer.sock.shutdown(socket.SHUT_WR)
    return "half a connection"


def _quiet(rng: Random, peer: Peer, watch: Watch) -> str:
    del rng, peer, watch
    return "nothing"


ENDS: Final[dict[str, tuple[int, Callable[[Random, Peer, Watch], str]]]] = {
    "end: closed": (6, _quiet),
    "end: version": (2, _version),
    "end: reply": (2, _reply),
    "end: size": (2, _huge),
    "end: garbage": (3, _garbage),
    "end: cut short": (4, _cut),
    "end: descriptors": (1, _hoard),
    "end: unread": (1, _deaf),
    "end: half closed": (2, _half),
}


def end(rng: Random, peer: Peer, watch: Watch) -> None:
    """End the connection in some way; it is closed afterwards in any case."""
    kinds = list(ENDS)
    (kind,) = rng.choices(kinds, [ENDS[kind][0] for kind in kinds])
    peer.log.note(kind, "...")
    with closing(peer):
        try:
            peer.log.last[-1] = f"{kind}: {ENDS[kind][1](rng, peer, watch)}"
        except Ended:
            peer.log.answers["ended"] += 1


def intrude(rng: Random, path: os.PathLike[str], peer: Peer) -> None:
    """Be a second front end while one is served; only the first one's service counts."""
    size = rng.choice((0, 1, 12, 4096))
    peer.log.note("second front end", f"{size} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
            sock.send(rng.randbytes(size), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # nobody has to be there for a second one
