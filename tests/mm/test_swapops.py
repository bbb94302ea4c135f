# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from hostzero.mm.swapops import SWP_AREA, is_swap_pte, pte_present, swp_entry_to_pte, swp_offset, swp_type


def test_an_entry_is_never_taken_for_a_page_or_for_nothing() -> None:
    for offset in (0, 1, (1 << 40) - 1):
        value = swp_entry_to_pte(SWP_AREA, offset)
        assert is_swap_pte(value)
        assert not pte_present(value)
        assert (swp_type(value), swp_offset(value)) == (SWP_AREA, offset)
        assert value < 1 << 52
    assert not is_swap_pte(0)
    assert not is_swap_pte(0x1003)
