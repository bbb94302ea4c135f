# SPDX-License-Identifier: GPL-2.0-only
"""A well-formed driver against backends that do as they are told, refuse, lie or are silent."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import pytest

from hostzero.conform.fuzz import driver as driver_module
from hostzero.conform.fuzz.arena import DATA_PFN, LOW_GPAS, Arena
from hostzero.conform.fuzz.driver import BITMAP_AT, BUFFERS_AT, QUEUES, Driver, Queue
from hostzero.conform.fuzz.finding import Ended, Found, Kind
from hostzero.conform.fuzz.peer import Log, Peer
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.vhost_user.messages import REQUEST_PAYLOADS
from hostzero.vhost_user.payloads import MemTable, VringState
from hostzero.vhost_user.protocol import F_PROTOCOL_FEATURES, ProtocolFeature, Request
from hostzero.virtio.features import Feature, QueueRole, queue_roles
from hostzero.virtio.mock import MockDevice
from hostzero.virtio.ring_layout import VIRTQ_DESC_F_WRITE
from tests.conform.fuzz import fakes
from tests.conform.fuzz.fakes import Answer, Script, honest, obliging, open_files, wait_for

PAGE = DATA_PFN + 9
ALL = Feature(fakes.EVERYTHING)


class Eager(Random):
    """Draws the first of everything, and wants every feature."""

    def random(self) -> float:
        return 0.0


@contextlib.contextmanager
def started(
    folder: Path, script: Script = obliging, rng: Random | None = None, low: int = 0
) -> Iterator[Driver]:
    """A driver that has brought up the device of a backend with such answers."""
    with (
        fakes.backend(folder / "sock", script),
        contextlib.closing(Peer(folder / "sock", Log())) as peer,
        contextlib.closing(Arena(low)) as arena,
        contextlib.closing(Driver(peer, arena)) as driver,
    ):
        driver.start(Random(1) if rng is None else rng)
        yield driver


@contextlib.contextmanager
def working(folder: Path, answer: Callable[[Arena], Answer] = honest, low: int = 0) -> Iterator[Driver]:
    """One whose queues are served, with every feature."""
    with started(folder, rng=Eager(), low=low) as driver:
        assert set(driver.queues) == set(QueueRole)
        with fakes.device(driver, answer(driver.arena)):
            yield driver


def claims(driver: Driver) -> tuple[int, int]:
    """How many pages were said to be zero, and how many were not."""
    return driver.peer.log.answers["zero"], driver.peer.log.answers["not zero"]


def found(call: Callable[..., Any], *arguments: Any) -> tuple[Kind, str]:
    with pytest.raises(Found) as caught:
        call(*arguments)
    return caught.value.kind, str(caught.value)


# ---------------------------------------------------------------------------- bringing it up


@pytest.mark.parametrize("seed", range(8))
def test_every_request_of_a_start_is_well_formed(tmp_path: Path, seed: int) -> None:
    heard: list[tuple[int, bytes, bool]] = []

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        heard.append((request, payload, acknowledged))
        return obliging(request, payload, acknowledged)

    low = LOW_GPAS[seed % len(LOW_GPAS)]
    with started(tmp_path, script, Random(seed), low) as driver:
        for request, payload, _ in heard:
            REQUEST_PAYLOADS[Request(request)].parse(payload)
        # What may be refused comes before anything that may not.
        asked = [request for request, _, acknowledged in heard if acknowledged]
        assert asked[0] == Request.RESET_DEVICE
        assert asked.index(Request.SET_FEATURES) < asked.index(Request.SET_MEM_TABLE)
        assert asked.index(Request.SET_MEM_TABLE) < asked.index(Request.SET_VRING_NUM)
        accepted = next(struct.unpack("=Q", p)[0] for r, p, _ in heard if r == Request.SET_FEATURES)
        assert accepted == int(driver.features) | F_PROTOCOL_FEATURES
        assert Feature.VERSION_1 in driver.features
        assert driver.features & ~ALL == Feature(0)
        assert list(driver.queues) == list(queue_roles(driver.features))
        tables = [MemTable.parse(p) for r, p, _ in heard if r == Request.SET_MEM_TABLE]
        assert tables == [driver.arena.table()[0]]
        for index, queue in enumerate(driver.queues.values()):
            assert queue.index == index
            assert queue.ring.layout.used < low + BUFFERS_AT
        enabled = [VringState.parse(p) for r, p, _ in heard if r == Request.SET_VRING_ENABLE]
        assert enabled[:QUEUES] == [VringState(index, 0) for index in range(QUEUES)]
        assert enabled[QUEUES:] == [VringState(index, 1) for index in range(len(driver.queues))]


def test_a_start_is_drawn_and_comes_again(tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with started(folder, rng=Random(seed)) as driver:
            drawn.append((driver.features, [q.ring.layout.size for q in driver.queues.values()]))
    assert drawn[0] == drawn[1]
    assert len({str(each) for each in drawn}) > 1


def test_a_zero_claim_for_reports_needs_reports(tmp_path: Path) -> None:
    seen = set()
    for seed in range(12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with started(folder, rng=Random(seed)) as driver:
            seen.add((Feature.REPORTING in driver.features, Feature.DEVICE_INIT_REPORTED in driver.features))
    assert (False, True) not in seen
    assert {(True, True), (False, False)} <= seen


def test_a_backend_without_protocol_features_is_only_asked_for_what_it_has(tmp_path: Path) -> None:
    heard: list[int] = []

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        heard.append(request)
        assert not acknowledged
        if request == Request.GET_PROTOCOL_FEATURES:
            return struct.pack("=Q", int(ProtocolFeature.MQ))
        return obliging(request, payload, acknowledged)

    with started(tmp_path, script) as driver:
        assert driver.queues
    assert not {Request.RESET_DEVICE, Request.SET_BACKEND_REQ_FD, Request.SET_CONFIG} & set(heard)


@pytest.mark.parametrize("request_", [Request.SET_FEATURES, Request.SET_MEM_TABLE, Request.SET_VRING_KICK])
def test_a_refusal_of_something_well_formed_is_found(tmp_path: Path, request_: Request) -> None:
    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        if request == request_:
            return struct.pack("=Q", 1)
        return obliging(request, payload, acknowledged)

    before = open_files()
    with (
        pytest.raises(Found, match=f"{request_.name} .*well-formed, is refused") as caught,
        started(tmp_path, script),
    ):
        pass
    assert caught.value.kind is Kind.REFUSED
    wait_for(lambda: open_files() == before)


@pytest.mark.parametrize("request_", [Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES])
def test_a_reply_that_is_no_number_is_found(tmp_path: Path, request_: Request) -> None:
    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        return b"" if request == request_ else obliging(request, payload, acknowledged)

    why = f"{request_.name} .*is answered by 0 bytes, not a number"
    with pytest.raises(Found, match=why) as caught, started(tmp_path, script):
        pass
    assert caught.value.kind is Kind.REFUSED


@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_ENABLE, Request.GET_VRING_BASE, Request.SET_OWNER, Request.SET_PROTOCOL_FEATURES],
)
def test_a_refusal_of_what_may_have_been_said_before_is_none(tmp_path: Path, request_: Request) -> None:
    refused = 0

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        nonlocal refused
        if request == request_ and not acknowledged:
            refused += 1
            return struct.pack("=Q", 1)
        return obliging(request, payload, acknowledged)

    with started(tmp_path, script) as driver:
        assert driver.queues
        assert driver.peer.log.answers["other"] + driver.peer.log.answers["success"] >= refused > 0


def test_a_second_life_stops_the_first(tmp_path: Path) -> None:
    heard: list[int] = []

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        heard.append(request)
        return obliging(request, payload, acknowledged)

    with started(tmp_path, script) as driver:
        heard.clear()
        driver.stop()
        assert heard == [Request.SET_VRING_ENABLE] * QUEUES + [Request.GET_VRING_BASE] * QUEUES + [
            Request.GET_FEATURES
        ]


def test_nothing_is_left_of_a_driver(tmp_path: Path) -> None:
    with started(tmp_path) as driver:
        held, queues = open_files(), len(driver.queues)
        driver.close()
        assert held - open_files() == 3 * queues + 1
        assert driver.queues == {}
        driver.close()


# ---------------------------------------------------------------------------- requests


@pytest.mark.parametrize("low", sorted(set(LOW_GPAS)))
def test_an_honest_device_is_believed(tmp_path: Path, low: int) -> None:
    with working(tmp_path, low=low) as driver:
        for seed in range(16):
            driver.work(Random(seed))
            driver.arena.check()
        log = driver.peer.log
        assert set(log.done) == {"driver", "report", "inflate", "deflate", "stats"}
        assert log.answers["zero"] > 100
        assert log.answers["not zero"] == 0


def test_work_is_drawn_and_comes_again(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def make(arena: Arena) -> Answer:
        def answer(queue: Queue, ring: MockDevice, head: int) -> tuple[int, int]:
            first = ring.descriptor(head)
            readable = queue.role is not QueueRole.REPORTING
            if queue.role is QueueRole.STATS:
                return head, 0  # nobody waits for it, so that it comes at any time
            heard.append(arena.guest.read(Gpa(first.addr), first.length) if readable else b"report")
            return head, 0

        return answer

    with working(tmp_path, make) as driver:
        for seed in (*range(10), *range(10)):
            driver.work(Random(seed))
    half = len(heard) // 2
    assert heard[:half] == heard[half:]
    assert len(set(heard)) > 4


def lying(change: Callable[[Queue, int, int], tuple[int, int] | None]) -> Callable[[Arena], Answer]:
    """A device that does as it is told, and says something else of it."""

    def make(arena: Arena) -> Answer:
        truth = honest(arena)

        def answer(queue: Queue, ring: MockDevice, head: int) -> tuple[int, int] | None:
            said = truth(queue, ring, head)
            assert said is not None
            return change(queue, *said)

        return answer

    return make


def keeping(arena: Arena) -> Answer:
    """A device that drops nothing, and says that it did."""

    def answer(queue: Queue, ring: MockDevice, head: int) -> tuple[int, int]:
        first = ring.descriptor(head)
        if queue.role is QueueRole.REPORTING:
            return head, first.length
        bitmap = ring.descriptor(first.next)
        arena.guest.write(Gpa(bitmap.addr), b"\xff" * bitmap.length)
        return head, bitmap.length

    return answer


def test_a_device_that_claims_nothing_is_believed(tmp_path: Path) -> None:
    with working(tmp_path, lambda _arena: lambda _queue, _ring, head: (head, 0)) as driver:
        driver._report(PAGE, 3)
        driver._balloon(driver.queues[QueueRole.INFLATE], [PAGE, PAGE + 1])
        assert claims(driver) == (0, 5)


def test_a_claim_that_is_not_true_is_found(tmp_path: Path) -> None:
    with working(tmp_path, keeping) as driver:
        why = f"a report of 3 pages at {PAGE:#x} is claimed zero and is not"
        assert found(driver._report, PAGE, 3) == (Kind.CLAIM, why)
        kind, text = found(driver._balloon, driver.queues[QueueRole.INFLATE], [PAGE + 1, PAGE])
        assert (kind, text) == (Kind.CLAIM, f"page {PAGE + 1:#x} is inflated, claimed zero and is not")


def test_a_bitmap_that_was_not_written_is_no_answer(tmp_path: Path) -> None:
    with working(tmp_path, lambda _arena: lambda _queue, _ring, head: (head, 2)) as driver:
        kind, text = found(driver._balloon, driver.queues[QueueRole.INFLATE], list(range(PAGE, PAGE + 9)))
        assert (kind, text) == (Kind.CLAIM, f"page {PAGE:#x} is inflated, claimed zero and is not")


@pytest.mark.parametrize("which", range(10))
def test_each_bit_of_a_bitmap_is_that_of_its_page(tmp_path: Path, which: int) -> None:
    """One page of ten keeps its bytes, and only its bit says zero."""

    def make(arena: Arena) -> Answer:
        def answer(_queue: Queue, ring: MockDevice, head: int) -> tuple[int, int]:
            bitmap = ring.descriptor(ring.descriptor(head).next)
            arena.guest.write(Gpa(bitmap.addr), (1 << which).to_bytes(bitmap.length, "little"))
            return head, bitmap.length

        return answer

    pfns = [PAGE + 2 * position for position in range(10)]
    with working(tmp_path, make) as driver:
        why = f"page {pfns[which]:#x} is inflated, claimed zero and is not"
        assert found(driver._balloon, driver.queues[QueueRole.INFLATE], pfns) == (Kind.CLAIM, why)
        fakes.drop(driver.arena, pfns[which] << PAGE_SHIFT, PAGE_SIZE)
        driver._balloon(driver.queues[QueueRole.INFLATE], pfns)
        assert claims(driver) == (1, 9)


@pytest.mark.parametrize("less", [1, PAGE_SIZE])
def test_a_length_that_no_report_can_have_is_found(tmp_path: Path, less: int) -> None:
    with working(tmp_path, lying(lambda _queue, head, used: (head, used - less))) as driver:
        why = f"a report of {3 * PAGE_SIZE} bytes is answered by a length of {3 * PAGE_SIZE - less}"
        assert found(driver._report, PAGE, 3) == (Kind.CLAIM, why)


def test_a_bitmap_of_the_wrong_length_is_found(tmp_path: Path) -> None:
    with working(tmp_path, lying(lambda _queue, head, used: (head, used + 1))) as driver:
        assert found(driver._balloon, driver.queues[QueueRole.INFLATE], list(range(PAGE, PAGE + 9))) == (
            Kind.CLAIM,
            "9 pages are answered by 3 bytes of bitmap",
        )


def test_without_the_bits_no_length_means_anything(tmp_path: Path) -> None:
    flags = []

    def make(arena: Arena) -> Answer:
        def answer(_queue: Queue, ring: MockDevice, head: int) -> tuple[int, int]:
            flags.append(ring.descriptor(head).flags)
            return head, 12345

        return answer

    with working(tmp_path, make) as driver:
        driver.features &= ~(Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE)
        driver._report(PAGE, 3)
        driver._balloon(driver.queues[QueueRole.INFLATE], [PAGE])
        driver._balloon(driver.queues[QueueRole.DEFLATE], [PAGE])
        assert claims(driver) == (0, 0)
    assert flags == [VIRTQ_DESC_F_WRITE, 0, 0]  # there is no room for a bitmap


def test_a_head_that_was_not_offered_is_found(tmp_path: Path) -> None:
    with working(tmp_path, lying(lambda _queue, head, used: (head + 1, used))) as driver:
        why = f"head 0 of the reporting queue came back as [(1, {PAGE_SIZE})]"
        assert found(driver._report, PAGE, 1) == (Kind.CLAIM, why)


def test_an_answer_that_comes_twice_is_found(tmp_path: Path) -> None:
    def make(arena: Arena) -> Answer:
        def answer(_queue: Queue, ring: MockDevice, head: int) -> None:
            ring.give_back((head, 0), (head, 0))

        return answer

    with working(tmp_path, make) as driver:
        kind, text = found(driver._balloon, driver.queues[QueueRole.DEFLATE], [PAGE])
        assert kind is Kind.CLAIM
        assert text == "head 0 of the deflate queue came back as [(0, 0), (0, 0)]"


def test_silence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with working(tmp_path, lying(lambda _queue, _head, _used: None)) as driver:
        monkeypatch.setattr(driver_module, "PATIENCE", 0.05)
        assert found(driver._report, PAGE, 1) == (
            Kind.SILENT,
            "a request on the reporting queue is not answered",
        )


def test_an_end_while_an_answer_is_due_is_an_end(tmp_path: Path) -> None:
    ending = threading.Event()

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        if ending.is_set():
            raise EOFError
        return obliging(request, payload, acknowledged)

    with started(tmp_path, script) as driver:
        ending.set()
        driver.peer.send(Request.SET_OWNER)
        with pytest.raises(Ended):
            driver._balloon(driver.queues[QueueRole.DEFLATE], [PAGE])


def test_what_was_given_away_is_named_and_no_more(tmp_path: Path) -> None:
    with working(tmp_path, lying(lambda _queue, head, _used: (head, 0))) as driver:
        driver._report(PAGE, 2)
        driver._balloon(driver.queues[QueueRole.INFLATE], [PAGE + 4])
        driver._balloon(driver.queues[QueueRole.DEFLATE], [PAGE + 8])
        driver.arena.check()
        fakes.drop(driver.arena, (PAGE + 8) << PAGE_SHIFT, PAGE_SIZE)
        why = f"page {PAGE + 8:#x} changed and nothing named it"
        with pytest.raises(Found, match=why):
            driver.arena.check()


def test_pages_that_are_kept_are_not_left_where_others_read(tmp_path: Path) -> None:
    with working(tmp_path) as driver:
        driver._balloon(driver.queues[QueueRole.DEFLATE], [PAGE, PAGE + 1])
        assert driver.arena.guest.read(Gpa(BUFFERS_AT), 8) == bytes(8)


def test_statistics_wait_for_nobody(tmp_path: Path) -> None:
    heard: SimpleQueue[tuple[int, bytes]] = SimpleQueue()

    def make(arena: Arena) -> Answer:
        def answer(_queue: Queue, ring: MockDevice, head: int) -> None:
            segment = ring.descriptor(head)
            assert segment.addr >= BITMAP_AT
            heard.put((head, arena.guest.read(Gpa(segment.addr), segment.length)))

        return answer

    with working(tmp_path, make) as driver:
        driver._stats(b"statistics")
        first, data = heard.get(timeout=30)
        assert data == b"statistics"
        driver._stats(b"more")
        assert heard.get(timeout=30)[0] != first  # which the device has still
