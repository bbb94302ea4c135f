# SPDX-License-Identifier: GPL-2.0-only
"""What the second reading of the device's documents allows."""

from __future__ import annotations

import pytest

from hostzero.check.wire.device_model import (
    DEFLATE,
    HINT,
    INFLATE,
    MUST_TELL_HOST,
    PAGE,
    PAGE_POISON,
    REPORT,
    STATS_VQ,
    VERSION_1,
    DeviceModel,
    Request,
)
from hostzero.check.wire.wire_rings import Parsed, Space

SIZES = {"inflate": 8, "deflate": 8, "stats": 8, "free-page": 8, "reporting": 8}


def model(acked: int = 0xFF, granule: int = 1) -> DeviceModel:
    made = DeviceModel(Space(((0, 64 * PAGE),)), acked | VERSION_1, SIZES, granule)
    for status in (1, 3):
        assert made.write_status(status)
    made.accepted = acked | VERSION_1
    assert made.write_status(11)
    return made


def inflate(*pfns: int) -> tuple[Request, list[object]]:
    data = b"".join(pfn.to_bytes(4, "little") for pfn in pfns)
    request = Request(INFLATE, Parsed(0, ((0, len(data)),), ((60 * PAGE, 1),)))
    return request, [lambda at, length: data[at : at + length]]


def changes(made: DeviceModel, *pfns: int) -> set[int]:
    request, reads = inflate(*pfns)
    return made.may_change(request, reads).pages  # type: ignore[arg-type]


def test_queues_are_numbered_over_what_was_accepted() -> None:
    assert [model(0).role(index) for index in range(3)] == ["inflate", "deflate", None]
    assert model(STATS_VQ).role(2) == "stats"
    assert model(0xFF & ~STATS_VQ & ~8).role(2) == "reporting"
    assert DeviceModel(Space(()), 0, SIZES).role(0) is None


@pytest.mark.parametrize(("value", "allowed"), [(15, True), (3, False), (32, False), (0, True)])
def test_a_status_only_grows(value: int, allowed: bool) -> None:
    assert model().write_status(value) == allowed


def test_only_pages_in_memory_and_not_in_the_answer_may_go() -> None:
    assert changes(model(), 1, 2, 60, 64) == {1, 2}


def test_a_piece_may_go_when_all_of_it_is_in_the_balloon() -> None:
    for acked, pages in ((0xFF, set(range(8, 16))), (0xFF & ~MUST_TELL_HOST, set())):
        made = model(acked, granule=8)
        assert changes(made, *range(8, 12)) == set()
        assert changes(made, *range(12, 16)) == pages


def test_a_deflate_that_read_either_array_leaves_what_either_leaves() -> None:
    made = model(0xFF, granule=8)
    changes(made, *range(8, 16))
    arrays = [(8).to_bytes(4, "little"), (9).to_bytes(4, "little")]
    reads = [lambda at, length, array=array: array for array in arrays]
    made.may_change(Request(DEFLATE, Parsed(0, ((0, 4),), ())), reads)
    assert made.balloon == set(range(8, 16))
    made.may_change(Request(DEFLATE, Parsed(0, ((0, 4),), ())), reads[:1])
    assert made.balloon == set(range(9, 16))


def test_a_command_that_was_read_as_either_leads_to_either() -> None:
    made = model(0xFF)
    made.hints, made.run = frozenset({"requested"}), 0x8000_0000
    texts = [made.run.to_bytes(4, "little"), bytes(4)]
    reads = [lambda at, length, text=text: text for text in texts]
    made.may_change(Request(HINT, Parsed(0, ((0, 4),), ())), reads)
    assert made.hints == {"started", "requested"}
    made.may_change(Request(HINT, Parsed(0, ((0, 4),), ())), reads[1:])
    assert made.hints == {"stopped", "requested"}
    made.learn(0)
    assert made.hints == {"stopped"}


def test_a_report_may_cost_whole_pages_only_and_none_under_poison_or_inhibition() -> None:
    request = Request(REPORT, Parsed(0, (), ((PAGE + 1, 3 * PAGE),)))
    made = model(0xFF)
    assert made.may_change(request, [lambda at, length: b""]).pages == {2, 3}
    assert not made.claims_all(request)
    made.inhibited = 1
    assert not made.may_change(request, [lambda at, length: b""]).pages
    made.inhibited = 0
    assert made.write_config(12, b"\1\0\0\0")
    assert made.acked & PAGE_POISON
    assert not made.may_change(request, [lambda at, length: b""]).pages


def test_statistics_are_whole_entries_with_known_tags() -> None:
    made = model()
    made.take_figures(bytes([5, 0, 1, *bytes(7)]) + bytes([99, 0, *bytes(8)]) + b"cut")
    assert made.figures == {5: 1}
