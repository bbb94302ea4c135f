# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory with a shadow: the guest's writes are expected, the device's show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.shadow import RAM_PAGES, RECEIVED, REGIONS, SHAPES, ShadowedMemory
from hostzero.errors import RamError, UsageError
from hostzero.units import Gpa


@pytest.fixture
def ram() -> Iterator[ShadowedMemory]:
    made = ShadowedMemory("anonymous", 1)
    yield made
    made.close()


def zero_pages(ram: ShadowedMemory) -> int:
    return int((~ram.bytes.reshape(RAM_PAGES, PAGE).any(axis=1)).sum())


def test_the_guests_writes_are_expected_and_others_show(ram: ShadowedMemory) -> None:
    ram.write(5, b"\0\0")
    assert not ram.changed().size
    ram.memory.write(Gpa(16), b"\0")
    assert ram.changed().tolist() == [2]
    assert ram.read(16, 1) == b"\0" != ram.read_before(16, 1)
    ram.accept(ram.changed())
    assert not ram.changed().size


def test_regions_are_where_guest_space_says(ram: ShadowedMemory) -> None:
    for first, at, count in REGIONS:
        assert ram.offset(first * PAGE, count * PAGE) == at * PAGE
        assert ram.offset(first * PAGE, count * PAGE + 1) is None
    # Two regions touch in guest space only.
    assert not ram.memory.contains(Gpa(95 * PAGE), 2 * PAGE)
    ram.write(200 * PAGE, b"nowhere")
    assert not ram.changed().size


@pytest.mark.parametrize(
    ("mode", "error", "dropped"),
    [(1, None, 0), (2, None, 2), (3, OSError, 2), (4, RamError, 2), (5, None, 2)],
)
def test_a_discard_fails_as_planned_and_only_once(
    ram: ShadowedMemory, mode: int, error: type[Exception] | None, dropped: int
) -> None:
    ram.plan_failure(1, mode)
    assert ram.memory.discard(Gpa(0), PAGE)
    assert not ram.discard_failed
    if error is None:
        assert not ram.memory.discard(Gpa(8 * PAGE), 4 * PAGE)
    else:
        with pytest.raises(error):
            ram.memory.discard(Gpa(8 * PAGE), 4 * PAGE)
    assert ram.discard_failed
    assert zero_pages(ram) == 1 + dropped
    assert ram.memory.discard(Gpa(8 * PAGE), 4 * PAGE)


def test_a_host_with_large_pages_drops_whole_pieces() -> None:
    ram = ShadowedMemory("memfd", 8)
    assert ram.memory.page_size(Gpa(0)) == 8 * PAGE
    assert not ram.memory.discard(Gpa(PAGE), 15 * PAGE)
    assert zero_pages(ram) == 8
    assert ram.memory.discard(Gpa(0), 16 * PAGE)
    ram.close()


@pytest.mark.parametrize("backing", ["anonymous", "memfd", RECEIVED])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_every_byte_of_the_host_is_seen_wherever_regions_lie(backing: str, shape: int) -> None:
    ram = ShadowedMemory(backing, 8, shape)
    assert ram.bytes.size == RAM_PAGES * PAGE
    for index, (first, at, count) in enumerate(SHAPES[shape]):
        assert ram.space.origins[index] == ram.offset(first * PAGE, PAGE) == at * PAGE
        whole = ram.space.host_page((first + 8) * PAGE, 8 * PAGE)
        assert whole is not None
        assert ram.memory.discard(Gpa(whole[0]), whole[1])
        start = at - first + whole[0] // PAGE
        assert start % 8 == 0
        assert not ram.bytes[start * PAGE : (start + 8) * PAGE].any()
        assert count > 8
    assert zero_pages(ram) == 8 * len(SHAPES[shape])
    ram.close()


def test_a_host_fails_at_its_stuck_pages_again_and_again(ram: ShadowedMemory) -> None:
    ram.plan_stuck(3, 1)
    for _ in range(2):
        assert not ram.memory.discard(Gpa(0), 6 * PAGE)
    assert ram.discard_failed
    assert zero_pages(ram) == 3
    ram.plan_stuck(0, 0)
    assert ram.memory.discard(Gpa(0), 6 * PAGE)


def test_a_host_without_proof_forgets_every_other_page() -> None:
    ram = ShadowedMemory("memfd", 1, proves=False)
    assert not ram.memory.discard(Gpa(0), 4 * PAGE)
    assert zero_pages(ram) == 2
    assert ram.discard_failed
    ram.close()


def test_a_backing_that_nobody_knows_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'tape'"):
        ShadowedMemory("tape", 1)
