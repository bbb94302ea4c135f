# SPDX-License-Identifier: GPL-2.0-only
"""Numbers as tables show them."""

from __future__ import annotations

import pytest

from hostzero.render import data_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (300 * 4096, "1.17 MiB"),
        (2 << 20, "2 MiB"),
        (12.25 * (1 << 20), "12.2 MiB"),
        (205 << 20, "205 MiB"),
        (1000.4 * (1 << 30), "1000 GiB"),
        ((1 << 64) - 1, "16 EiB"),
        (0xFFFF_FFFF << 12, "16.0 TiB"),
    ],
)
def test_a_size_in_three_digits(size: float, text: str) -> None:
    assert data_size(size) == text
