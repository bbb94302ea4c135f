# SPDX-License-Identifier: GPL-2.0-only
"""Sizes as text, and the way between addresses and frame numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import UsageError
from hostzero.units import Gpa, Pfn, format_size, gpa_to_pfn, parse_size, pfn_to_gpa


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1", 1),
        ("4K", 4096),
        ("256M", 256 << 20),
        ("2GiB", 2 << 30),
        ("2 gb", 2 << 30),
        ("1t", 1 << 40),
        (" 8M ", 8 << 20),
        ("512B", 512),
    ],
)
def test_sizes_are_read_as_qemu_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1.5G", "0x10", "1P", "1MM", "one", "1 0M", "1M 2M", "\u0661M"]
)
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size: write a whole number") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "0G", "000K"])
def test_a_size_is_above_zero(text: str) -> None:
    with pytest.raises(UsageError, match="must be above zero"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1K"),
        (3 << 20, "3M"),
        ((1 << 30) + 1024, "1048577K"),
        (1 << 50, "1024T"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_divides_it(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1 << 60))
def test_what_is_written_can_be_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 1 << 52))
def test_an_address_belongs_to_the_page_that_holds_it(address: int) -> None:
    pfn = gpa_to_pfn(Gpa(address))
    assert pfn_to_gpa(pfn) <= address < pfn_to_gpa(Pfn(pfn + 1))
    assert pfn_to_gpa(pfn) % 4096 == 0
