# SPDX-License-Identifier: GPL-2.0-only
"""Every message that is drawn can be framed, says what is in it, and shows memory only where it may."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.conform.fuzz import files, messages
from hostzero.conform.fuzz.arena import Arena
from hostzero.conform.fuzz.messages import MESSAGES, Sending, send_any
from hostzero.units import Gpa
from hostzero.vhost_user.messages import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    PAYLOAD_MAX,
    REQUEST_PAYLOADS,
    VERSION,
    VERSION_MASK,
)
from hostzero.vhost_user.payloads import Region, VringAddr
from hostzero.vhost_user.protocol import Request
from tests.conform.fuzz.fakes import connected, open_files

SEEDS = st.integers(0, (1 << 64) - 1)
KINDS = sorted(MESSAGES)
FDS_AT_ONCE = 253
"""What the kernel takes with one message (SCM_MAX_FD)."""


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with contextlib.closing(Arena(0)) as made:
        yield made


def drawn(kind: str, seed: int, arena: Arena) -> Sending:
    return MESSAGES[kind][1](Random(seed), arena)


def many(kind: str, arena: Arena, count: int = 1500) -> list[Sending]:
    return [drawn(kind, seed, arena) for seed in range(count)]


def header(sending: Sending) -> tuple[int, int, int]:
    request, flags, size = HEADER.unpack_from(sending.data)
    return request, flags, size


def requests(sendings: list[Sending]) -> set[int]:
    return {header(sending)[0] for sending in sendings}


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
def test_the_framing_is_kept(kind: str, arena: Arena, seed: int) -> None:
    sending = drawn(kind, seed, arena)
    request, flags, size = header(sending)
    assert len(sending.data) == HEADER.size + size <= HEADER.size + PAYLOAD_MAX
    assert flags & (VERSION_MASK | FLAG_REPLY) == VERSION
    assert request != Request.GET_FEATURES  # that one is the mark
    assert set(sending.files) <= set(files.ALL)
    assert max(len(sending.files), sending.memory) <= FDS_AT_ONCE
    assert drawn(kind, seed, arena) == sending


@pytest.mark.parametrize("kind", KINDS)
def test_an_acknowledgement_is_wanted_now_and_then(kind: str, arena: Arena) -> None:
    flags = [header(sending)[1] for sending in many(kind, arena, 300)]
    assert 0.3 < sum(bool(each & FLAG_NEED_REPLY) for each in flags) / 300 < 0.7
    assert any(each >= 1 << 16 for each in flags)


def test_values_have_the_size_and_the_descriptors_of_their_request(arena: Arena) -> None:
    sendings = many("message: values", arena)
    assert requests(sendings) == set(messages.REQUESTS)
    for sending in sendings:
        request, _, size = header(sending)
        payload = sending.data[HEADER.size :]
        if request == Request.SET_MEM_TABLE:
            assert size % 32 == 8
            continue
        if request in {Request.GET_CONFIG, Request.SET_CONFIG}:
            assert size == 12 + struct.unpack_from("=I", payload, 4)[0]
        elif request in REQUEST_PAYLOADS:
            assert size == {"Empty": 0, "VringAddr": 40}.get(REQUEST_PAYLOADS[Request(request)].__name__, 8)
        if request == Request.SET_BACKEND_REQ_FD:
            assert len(sending.files) == 1
        elif request in {Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR}:
            number = struct.unpack("=Q", payload)[0]
            assert len(sending.files) == 1 or (not sending.files and number & 1 << 8)
        else:
            assert not sending.files
        assert not sending.memory


def test_a_ring_that_is_placed_may_be_written_to(arena: Arena) -> None:
    placed = 0
    for seed in range(600):
        if header(drawn("message: values", seed, arena))[0] != Request.SET_VRING_ADDR:
            continue
        with contextlib.closing(Arena(0)) as fresh:
            sending = drawn("message: values", seed, fresh)
            addr = VringAddr(*struct.unpack_from("=IIQQQQ", sending.data, HEADER.size))
            for region in fresh.table()[0].regions[1:]:
                if region.user <= addr.used <= region.user + region.size - 6:
                    gpa = Gpa(region.gpa + addr.used - region.user)
                    fresh.guest.write(gpa, bytes(6))
                    fresh.check()
                    placed += 1
    assert placed > 3


def test_payloads_of_any_size(arena: Arena) -> None:
    sendings = many("message: size", arena)
    assert requests(sendings) == set(messages.REQUESTS)
    sizes = {header(each)[2] for each in sendings}
    assert {0, 1, 7, 8, 9, 39, 40, 41, PAYLOAD_MAX} <= sizes
    assert not any(each.files or each.memory for each in sendings)


def test_any_number_of_descriptors(arena: Arena) -> None:
    sendings = many("message: descriptors", arena)
    assert requests(sendings) == set(messages.REQUESTS)
    assert {len(each.files) for each in sendings} >= {0, 1, 2, 8, 9, FDS_AT_ONCE}
    for sending in sendings:
        request, _, size = header(sending)
        if request == Request.SET_VRING_ADDR:
            assert size == 40
        elif request in {Request.SET_VRING_NUM, Request.SET_VRING_KICK, Request.SET_FEATURES}:
            assert size == 8


def test_a_request_that_there_is_not(arena: Arena) -> None:
    asked = requests(many("message: unknown", arena))
    assert not asked & {int(request) for request in Request}
    assert {0, 0xFFFF_FFFF} <= asked


def test_pieces_come_with_descriptors_on_each(arena: Arena) -> None:
    sendings = many("message: pieces", arena, 300)
    assert all(each.pieces for each in sendings)
    assert {len(each.files) for each in sendings} == {0, 1, 3, 9}
    assert not any(each.pieces for kind in KINDS if "pieces" not in kind for each in many(kind, arena, 50))


def test_guest_memory_is_shown_only_by_a_table_that_is_right(arena: Arena) -> None:
    right = arena.table()[0].pack()
    own = 0
    for kind in KINDS:
        for sending in many(kind, arena, 400):
            request, _, _ = header(sending)
            is_right = request == Request.SET_MEM_TABLE and sending.data[HEADER.size :] == right
            if sending.own:
                assert is_right
                assert not sending.files
                assert sending.memory == 3
                own += 1
    assert own > 5


def test_a_table_is_wrong_in_the_way_that_it_says(arena: Arena) -> None:
    low, data, far = arena.table()[0].regions
    by_kind: dict[str, list[tuple[int, list[Region], Sending]]] = defaultdict(list)
    for sending in many("message: memory table", arena):
        assert header(sending)[0] == Request.SET_MEM_TABLE
        payload = sending.data[HEADER.size :]
        regions = [Region(*fields) for fields in struct.iter_unpack("=QQQQ", payload[8:])]
        by_kind[sending.text.partition(",")[0]].append(
            (struct.unpack_from("=I", payload)[0], regions, sending)
        )
        assert sending.memory == min(len(regions), 9)
    assert [low, data, far] not in [regions for _, regions, _ in by_kind["odd"][:20]]
    for _, regions, _ in by_kind["file"]:
        assert regions == [low, data._replace(mmap_offset=low.mmap_offset), far]
    for _, regions, _ in by_kind["guest"]:
        assert regions == [low, data._replace(gpa=far.gpa), far]
    for _, regions, _ in by_kind["user"]:
        assert regions == [low, data, far._replace(user=data.user + 4096)]
    assert {len(regions) for _, regions, _ in by_kind["number"]} == {0, 6, 9}
    assert any(count != 3 for count, _, _ in by_kind["count"])
    assert {tuple(sending.files) for _, _, sending in by_kind["vast"]} == {("vast memfd",)}
    assert max(regions[0].size for _, regions, _ in by_kind["vast"]) == 1 << 45
    assert {len(sending.files) for _, _, sending in by_kind["other files"]} == set(range(10))
    assert sum(sending.files[0] in files.ODD for _, _, sending in by_kind["no memory"]) > 50
    assert all(regions == [low, data, far] for _, regions, _ in by_kind["right"])
    for kind, tables in by_kind.items():
        assert len(tables) > 50
        assert kind in {"odd", "count", "number", "other files"} or len({t[0] for t in tables}) == 1


# ---------------------------------------------------------------------------- sending


def received(backend: socket.socket, size: int) -> tuple[bytes, list[list[os.stat_result]]]:
    """What comes, and the files with each part of it."""
    data, rights = b"", []
    while len(data) < size:
        part, fds, _, _ = socket.recv_fds(backend, 1 << 16, FDS_AT_ONCE)
        data += part
        if fds:
            rights.append([os.fstat(fd) for fd in fds])
        for fd in fds:
            os.close(fd)
    return data, rights


def test_what_is_drawn_is_sent_and_nothing_is_left(arena: Arena, tmp_path: Path) -> None:
    memory = os.fstat(arena.fd).st_ino
    seen = set()
    with connected(tmp_path) as (peer, backend), ThreadPoolExecutor(1) as reader:
        before = open_files()
        for seed in range(400):
            rng = Random(seed)
            (kind,) = rng.choices(list(MESSAGES), [weight for weight, _ in MESSAGES.values()])
            expected = MESSAGES[kind][1](rng, arena)
            seen.add(kind)
            reading = reader.submit(received, backend, len(expected.data))
            send_any(Random(seed), peer, arena)
            data, rights = reading.result()
            assert data == expected.data
            assert peer.log.last[-1].startswith(f"{kind}: {expected.text}")
            fds = len(expected.files) or expected.memory
            times = (len(expected.data) if expected.pieces else 1) if fds else 0
            assert [len(each) for each in rights] == [fds] * times
            assert {each.st_ino == memory for part in rights for each in part} <= {expected.own}
            assert open_files() == before
    assert seen == set(KINDS)
    assert sum(peer.log.done.values()) == 400
