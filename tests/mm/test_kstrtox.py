# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import errno

import pytest

from hostzero.mm.kstrtox import UINT_MAX, kstrtouint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("512\n", 512),
        ("+7", 7),
        ("0x1F", 31),
        ("0X1f\n", 31),
        ("010", 8),
        ("00", 0),
        ("4294967295", UINT_MAX),
        ("0xffffffff", UINT_MAX),
    ],
)
def test_numbers_in_three_bases(text: str, value: int) -> None:
    assert kstrtouint(text) == value


@pytest.mark.parametrize(
    "text", ["", "\n", "-1", "-0", " 1", "1 ", "1\n\n", "1.0", "0x", "08", "1k", "+", "++1", "٣"]
)
def test_anything_else_is_invalid(text: str) -> None:
    with pytest.raises(OSError, match="Invalid") as caught:
        kstrtouint(text)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("text", ["4294967296", "0x100000000", "18446744073709551615", "9" * 40])
def test_numbers_of_more_than_32_bits_are_out_of_range(text: str) -> None:
    with pytest.raises(OSError, match="out of range") as caught:
        kstrtouint(text)
    assert caught.value.errno == errno.ERANGE
