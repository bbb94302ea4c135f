# SPDX-License-Identifier: GPL-2.0-only
"""The bytes inside balloon requests, against layouts written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import VirtioError
from hostzero.virtio import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    CONFIG,
    CONFIG_ACTUAL,
    CONFIG_FREE_PAGE_HINT_CMD_ID,
    CONFIG_NUM_PAGES,
    CONFIG_POISON_VAL,
    VIRTIO_BALLOON_S_NR,
    BalloonConfig,
    StatTag,
    bitmap_bytes,
    bitmap_set_le,
    bitmap_test_le,
    bitmap_to_mask,
    mask_to_bitmap,
    pack_pfns,
    pack_stats,
    unpack_pfns,
    unpack_stats,
)


def test_configuration_is_four_le32() -> None:
    config = BalloonConfig(0x01020304, 0x11121314, 0x80000000, 0xAAAAAAAA)
    data = bytes.fromhex("04030201 14131211 00000080 aaaaaaaa")
    assert config.pack() == data
    assert BalloonConfig.unpack(data) == config
    offsets = (CONFIG_NUM_PAGES, CONFIG_ACTUAL, CONFIG_FREE_PAGE_HINT_CMD_ID, CONFIG_POISON_VAL)
    assert tuple(int.from_bytes(data[at : at + 4], "little") for at in offsets) == config
    assert CONFIG.size == 16


@pytest.mark.parametrize("length", [0, 8, 15, 17])
def test_a_configuration_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(VirtioError, match=f"16 bytes, not {length}"):
        BalloonConfig.unpack(bytes(length))


def test_a_new_configuration_asks_for_nothing() -> None:
    assert BalloonConfig() == (0, 0, CMD_ID_STOP, 0)
    assert (CMD_ID_STOP, CMD_ID_DONE) == (0, 1)


def test_statistics_are_ten_bytes_packed() -> None:
    data = bytes.fromhex("0400 0807060504030201 0f00 ffffffffffffffff")
    stats = [(StatTag.MEMFREE, 0x0102030405060708), (StatTag.DIRECT_RECLAIM, (1 << 64) - 1)]
    assert pack_stats(stats) == data
    assert unpack_stats(data) == stats


def test_there_are_sixteen_tags_numbered_from_zero() -> None:
    assert [int(tag) for tag in StatTag] == list(range(16))
    assert VIRTIO_BALLOON_S_NR == 16


def test_unknown_and_double_tags_arrive_as_sent() -> None:
    sent = [(0xFFFF, 1), (3, 2), (3, 4)]
    assert unpack_stats(pack_stats(sent)) == sent


@pytest.mark.parametrize("extra", range(10))
def test_a_statistics_entry_cut_short_is_dropped(extra: int) -> None:
    assert unpack_stats(pack_stats([(1, 2)]) + bytes(extra)) == [(1, 2)]


def test_a_statistic_wraps_to_64_bits() -> None:
    assert unpack_stats(pack_stats([(0, (1 << 64) + 5)])) == [(0, 5)]


@given(st.lists(st.integers(0, 0xFFFF_FFFF), max_size=300))
def test_pfns_are_le32(pfns: list[int]) -> None:
    data = b"".join(pfn.to_bytes(4, "little") for pfn in pfns)
    assert pack_pfns(pfns) == data
    assert unpack_pfns(data).tolist() == pfns
    assert unpack_pfns(data).dtype == np.int64


@pytest.mark.parametrize("bad", [-1, 1 << 32, -(1 << 40)])
def test_a_pfn_that_would_be_cut_to_another_page_is_refused(bad: int) -> None:
    with pytest.raises(VirtioError, match="outside 32 bits"):
        pack_pfns([5, bad])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 1023])
def test_a_pfn_array_with_a_part_of_a_pfn_is_refused(length: int) -> None:
    with pytest.raises(VirtioError, match=f"{length} bytes is not a whole number"):
        unpack_pfns(bytes(length))


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (8, 1), (9, 2), (256, 32), (257, 33)])
def test_bitmap_bytes_round_up(count: int, expected: int) -> None:
    assert bitmap_bytes(count) == expected


def test_bits_count_from_the_least_significant_bit_of_the_first_byte() -> None:
    buffer = bytearray(3)
    for n in (0, 9, 23):
        bitmap_set_le(buffer, n)
    assert buffer == bytes([0x01, 0x02, 0x80])
    assert [n for n in range(24) if bitmap_test_le(buffer, n)] == [0, 9, 23]


@given(st.lists(st.booleans(), max_size=300))
def test_masks_and_bitmaps_agree_bit_by_bit(mask: list[bool]) -> None:
    buffer = bytearray(bitmap_bytes(len(mask)))
    for n, value in enumerate(mask):
        if value:
            bitmap_set_le(buffer, n)
    assert mask_to_bitmap(mask) == buffer
    assert bitmap_to_mask(buffer, len(mask)).tolist() == mask


@given(st.binary(max_size=8), st.integers(0, 80))
def test_bits_that_were_not_received_are_clear(received: bytes, count: int) -> None:
    mask = bitmap_to_mask(received, count)
    assert mask.shape == (count,)
    assert mask.tolist() == [n < 8 * len(received) and bitmap_test_le(received, n) for n in range(count)]
