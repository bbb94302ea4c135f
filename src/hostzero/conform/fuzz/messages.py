# SPDX-License-Identifier: GPL-2.0-only
"""Malformed and untimely messages: drawn whole, with what is to be said of them, and then sent."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Final, NamedTuple

from hostzero.conform.fuzz import draw, files
from hostzero.conform.fuzz.arena import Arena
from hostzero.conform.fuzz.peer import Peer
from hostzero.vhost_user.messages import FLAG_NEED_REPLY, HEADER, VERSION
from hostzero.vhost_user.payloads import MemTable, Region
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, Request, name_of

REQUESTS: Final = tuple(request for request in Request if request is not Request.GET_FEATURES)
"""What is sent malformed; GET_FEATURES marks how far the backend has come."""

_NUMBERS: Final = (Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES)
_FDS: Final = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
_STATES: Final = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
)
_CONFIGS: Final = (Request.GET_CONFIG, Request.SET_CONFIG)
_SIZES: Final = dict.fromkeys((*_NUMBERS, *_FDS, *_STATES), 8) | {Request.SET_VRING_ADDR: 40}


class Sending(NamedTuple):
    """A message.

    Attributes:
        text: what is wrong with it.
        data: its bytes, header included.
        files: the descriptors that go with it, by name (`files.ALL`).
        memory: how many descriptors of one file go with it, if no others do.
        own: whether that file is guest memory; else it is one of the same size. A table that is
            wrong and legal must not show the backend guest memory at other addresses.
        pieces: whether it is sent byte by byte, the descriptors with each of them.
    """

    text: str
    data: bytes
    files: Sequence[str] = ()
    memory: int = 0
    own: bool = False
    pieces: bool = False


def send_any(rng: Random, peer: Peer, arena: Arena) -> None:
    """Send one message of any kind."""
    kinds = list(MESSAGES)
    (kind,) = rng.choices(kinds, [MESSAGES[kind][0] for kind in kinds])
    drawn = MESSAGES[kind][1](rng, arena)
    peer.log.note(kind, f"{drawn.text} {' '.join(drawn.files)}")
    with files.opened(drawn.files or ["twin memfd"][: drawn.memory]) as fds:
        if not drawn.files:
            fds = [arena.fd if drawn.own else fd for fd in fds] * drawn.memory
        if not drawn.pieces:
            peer.send_raw(drawn.data, fds)
            return
        for at in range(len(drawn.data)):
            peer.send_raw(drawn.data[at : at + 1], fds)


def _message(rng: Random, request: int, payload: bytes) -> bytes:
    flags = VERSION | (FLAG_NEED_REPLY if rng.random() < 0.5 else 0)
    # Bits above the defined ones mean nothing, and have to be ignored.
    flags |= rng.randrange(1 << 28) << 4 if rng.random() < 0.1 else 0
    return HEADER.pack(request, flags, len(payload)) + payload


def _rarely(rng: Random, bits: int) -> int:
    return draw.number(rng, bits) if rng.random() < 0.1 else 0


def _values(rng: Random, arena: Arena) -> Sending:
    """The right size and number of descriptors, and any values."""
    request = rng.choice(REQUESTS)
    payload, names = b"", []
    if request is Request.SET_MEM_TABLE:
        return _table(rng, arena)
    if request in _NUMBERS:
        bits = rng.choice((0x1_2000_00FF, F_PROTOCOL_FEATURES, 0x2229, 0, draw.number(rng, 64)))
        payload = struct.pack("=Q", bits | _rarely(rng, 64))
    elif request in _FDS:
        has = rng.random() < 0.8
        payload = struct.pack("=Q", draw.number(rng, 3) | (0 if has else 1 << 8) | _rarely(rng, 64))
        names = files.draw(rng, int(has), files.EVENTS)
    elif request in _STATES:
        payload = struct.pack("=II", draw.number(rng, 3) | _rarely(rng, 32), draw.number(rng, 32))
    elif request is Request.SET_VRING_ADDR:
        at = [draw.address(rng, arena) & ~(15 if rng.random() < 0.8 else 0) for _ in range(4)]
        for gpa in at:
            arena.name_ring(gpa)
        payload = struct.pack("=IIQQQQ", rng.randrange(5), _rarely(rng, 32), *map(arena.user, at))
    elif request in _CONFIGS:
        size = rng.choice((0, 1, 4, 8, 16, 17, 256, 257))
        payload = struct.pack("=III", draw.number(rng, 9), size, _rarely(rng, 32)) + rng.randbytes(size)
    elif request is Request.SET_BACKEND_REQ_FD:
        names = files.draw(rng, 1, {"socket": files.ODD["socket"]})
    return Sending(f"{name_of(request)} {payload[:40].hex()}", _message(rng, request, payload), names)


def _size(rng: Random, _arena: Arena) -> Sending:
    """A payload of any size."""
    request = rng.choice(REQUESTS)
    size = rng.choice((rng.randrange(64), rng.randrange(4097), 4096))
    return Sending(f"{name_of(request)} with {size} bytes", _message(rng, request, rng.randbytes(size)))


def _descriptors(rng: Random, _arena: Arena) -> Sending:
    """The right size, and any number of descriptors."""
    request = rng.choice(REQUESTS)
    names = files.draw(rng, rng.choice((0, 1, 2, 3, 7, 8, 9, 10, 16, 64, 253)), files.EVENTS)
    data = _message(rng, request, rng.randbytes(_SIZES.get(request, 0)))
    return Sending(f"{name_of(request)} with {len(names)} descriptors", data, names)


def _unknown(rng: Random, _arena: Arena) -> Sending:
    """A request that there is not."""
    request = rng.choice((0, 19, 20, 22, 23, 26, 33, 35, 41, 255, 0x8000_0000, 0xFFFF_FFFF))
    return Sending(f"request {request}", _message(rng, request, rng.randbytes(rng.choice((0, 8, 40)))))


def _table(rng: Random, arena: Arena) -> Sending:
    """A memory table with one thing wrong, or several."""
    regions = list(arena.table()[0].regions)
    names: list[str] = []
    count = None
    kind = rng.choice(
        ("odd", "file", "guest", "user", "number", "count", "vast", "other files", "no memory", "right")
    )
    if kind == "odd":
        regions = [_odd_region(rng, region) for region in regions]
    elif kind == "file":
        regions[1] = regions[1]._replace(mmap_offset=regions[0].mmap_offset)
    elif kind == "guest":
        regions[1] = regions[1]._replace(gpa=regions[2].gpa)
    elif kind == "user":
        regions[2] = regions[2]._replace(user=regions[1].user + 4096)
    elif kind == "number":
        regions = regions * rng.choice((2, 3, 0))
    elif kind == "count":
        count = draw.number(rng, 32)
    elif kind == "vast":
        # Legal, and as large as a file can be said to be.
        names = ["vast memfd"]
        size, gpa = rng.choice((1 << 30, 1 << 40, 1 << 45)), rng.choice((0, 1 << 40, 1 << 63))
        regions = [Region(gpa, size, 1 << 44, 0)]
    elif kind == "other files":
        names = files.draw(rng, rng.randrange(10), files.MEMORY)
        regions = [Region(n << 20, 4096 << rng.randrange(8), n << 24, 0) for n in range(len(names))]
    elif kind == "no memory":
        names = files.draw(rng, 1, files.ODD)
        regions = [Region(0, 4096, 0, 0)]
    payload = MemTable(tuple(regions)).pack()
    if count is not None:
        payload = struct.pack("=I", count) + payload[4:]
    data = _message(rng, Request.SET_MEM_TABLE, payload)
    text = f"{kind}, {len(regions)} regions {payload[8:40].hex()}"
    return Sending(text, data, names, min(len(regions), 9), kind == "right")


def _odd_region(rng: Random, region: Region) -> Region:
    field = rng.choice(Region._fields)
    value = rng.choice((0, 1, 2048, 4095, 1 << 21, 1 << 46, (1 << 64) - 4096, draw.number(rng, 64)))
    return region._replace(**{field: (getattr(region, field) + value) % (1 << 64)})


def _pieces(rng: Random, _arena: Arena) -> Sending:
    """A message byte by byte, with descriptors on each of them."""
    request = rng.choice(REQUESTS)
    data = _message(rng, request, rng.randbytes(rng.choice((0, 8, 40, 200))))
    names = ["eventfd"] * rng.choice((0, 1, 3, 9))
    return Sending(f"{name_of(request)}, {len(data)} pieces", data, names, pieces=True)


MESSAGES: Final[dict[str, tuple[int, Callable[[Random, Arena], Sending]]]] = {
    "message: values": (10, _values),
    "message: size": (3, _size),
    "message: descriptors": (3, _descriptors),
    "message: unknown": (1, _unknown),
    "message: memory table": (4, _table),
    "message: pieces": (1, _pieces),
}
"""Weight and maker by kind."""
