# SPDX-License-Identifier: GPL-2.0-only
"""The allocator's own measurement, on a small guest: what is measured and kept, not how long it took."""

from __future__ import annotations

import gc
import json

import pytest

from hostzero.bench import allocator
from hostzero.bench.allocator import run_allocator
from hostzero.document import to_json
from hostzero.ram import Ram, open_ram
from tests.bench.recorder import Recorder
from tests.ram.host import mapped

pytestmark = pytest.mark.compiled_only  # loops over thousands of blocks

MIB = 1 << 20
COLUMNS = [
    "order0_alloc_ns",
    "order0_free_ns",
    "order9_alloc_ns",
    "order9_free_ns",
    "memset_4k_ns",
    "control_share_order0",
    "control_share_order9",
]


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Ram]:
    """Every memory that is opened, under a measurement a sixteenth its usual size."""
    rams: list[Ram] = []

    def spy(size: int) -> Ram:
        rams.append(open_ram(size))
        return rams[-1]

    monkeypatch.setattr(allocator, "open_ram", spy)
    monkeypatch.setattr(allocator, "MEMORY", 128 * MIB)
    monkeypatch.setattr(allocator, "SIZE", 32 * MIB)
    monkeypatch.setattr(allocator, "_ORDER0_BLOCKS", 8192)
    monkeypatch.setattr(allocator, "_ORDER9_BLOCKS", 16)
    monkeypatch.setattr(allocator, "_MEMSET_PAGES", 8192)
    return rams


def test_every_column_has_every_repetition(opened: list[Ram]) -> None:
    recorder = Recorder()
    results = run_allocator(3, recorder)
    columns = results.columns()
    assert list(columns) == COLUMNS
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys(COLUMNS, 3)
    assert all(value > 0 for values in columns.values() for value in values)
    for name in ("control_share_order0", "control_share_order9"):
        assert all(share < 1 for share in columns[name])
    assert recorder.scenarios == [("allocator", 3)]
    assert recorder.steps == [["1 of 3", "2 of 3", "3 of 3"]]
    assert [(ram.size, ram.closed) for ram in opened] == [(128 * MIB, True)]


def test_the_document(opened: list[Ram]) -> None:
    document = json.loads(to_json(run_allocator(1, Recorder()).to_document()))
    assert document["version"] == 1
    assert [name for name in document if name not in {"version", "host"}] == COLUMNS
    assert document["host"]["hardware_counters"] == "not asked for"


def test_a_guest_too_small_for_the_blocks_is_a_defect_and_is_said(
    opened: list[Ram], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "_ORDER9_BLOCKS", 64)
    with pytest.raises(AssertionError, match="a quarter of the guest has only"):
        run_allocator(1, Recorder())
    assert [ram.closed for ram in opened] == [True]


def test_an_interrupt_leaves_no_memory_behind(opened: list[Ram]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_allocator(3, Recorder(interrupt_at=1))
    (ram,) = opened
    assert ram.closed
    assert gc.isenabled()
    gc.collect()  # guest, driver and device refer to each other
    assert not mapped(ram.base)
