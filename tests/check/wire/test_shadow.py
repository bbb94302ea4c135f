# SPDX-License-Identifier: GPL-2.0-only
"""Guest memory with a shadow: the guest's writes are expected, the device's show."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.check.wire.device_model import PAGE
from hostzero.check.wire.shadow import RAM_PAGES, REGIONS, ShadowedMemory
from hostzero.errors import RamError
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
