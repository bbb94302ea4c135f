# SPDX-License-Identifier: GPL-2.0-only
"""Loads and stores of ring fields are little endian on any machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.virtio import barrier


@given(value=st.integers(0, 0xFFFF), at=st.integers(0, 3))
def test_a_word_is_little_endian_in_memory(value: int, at: int) -> None:
    data = bytearray(b"\xa5" * 8)
    words = memoryview(data).cast("H")
    barrier.store_le16(words, at, value)
    assert data[2 * at : 2 * at + 2] == value.to_bytes(2, "little")
    assert data[: 2 * at] + data[2 * at + 2 :] == b"\xa5" * 6
    assert barrier.load_le16(words, at) == value


def test_a_big_endian_machine_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "_SWAP", not barrier._SWAP)
    data = bytearray(4)
    words = memoryview(data).cast("H")
    barrier.store_le16(words, 1, 0x1234)
    assert data == b"\0\0" + (0x1234).to_bytes(2, "little")[::-1]
    assert barrier.load_le16(words, 1) == 0x1234


def test_the_barrier_can_be_taken_again() -> None:
    barrier.full_barrier()
    barrier.full_barrier()
    assert not barrier._lock.locked()
