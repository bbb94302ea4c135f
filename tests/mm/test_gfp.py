# SPDX-License-Identifier: GPL-2.0-only
"""What allocation flags ask for."""

from __future__ import annotations

import pytest

from hostzero.mm import gfp
from hostzero.mm.mmzone import MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE


@pytest.mark.parametrize(
    ("flags", "migratetype"),
    [
        (gfp.GFP_KERNEL, MIGRATE_UNMOVABLE),
        (gfp.GFP_ATOMIC | gfp.__GFP_ZERO | gfp.__GFP_COMP, MIGRATE_UNMOVABLE),
        (gfp.GFP_HIGHUSER_MOVABLE, MIGRATE_MOVABLE),
        (gfp.GFP_TRANSHUGE, MIGRATE_MOVABLE),
        (gfp.GFP_KERNEL | gfp.__GFP_RECLAIMABLE, MIGRATE_RECLAIMABLE),
    ],
)
def test_the_mobility_bits_are_the_migrate_type(flags: int, migratetype: int) -> None:
    assert gfp.gfp_migratetype(flags) == migratetype


@pytest.mark.parametrize(
    ("flags", "may_block"),
    [
        (gfp.GFP_KERNEL, True),
        (gfp.GFP_USER, True),
        (gfp.GFP_TRANSHUGE, True),
        (gfp.GFP_TRANSHUGE_LIGHT, False),
        (gfp.GFP_ATOMIC, False),
        (gfp.GFP_NOWAIT, False),
    ],
)
def test_only_direct_reclaim_may_block(flags: int, may_block: bool) -> None:
    assert gfp.gfpflags_allow_blocking(flags) == may_block


def test_no_user_address_is_not_address_zero() -> None:
    """Address 0 is a legal mapping (patch 7): NONE is all ones."""
    assert gfp.USER_ADDR_NONE == -1


def test_the_names_for_class_bodies_are_the_kernels_bits() -> None:
    names = ["ZERO", "COMP", "NORETRY", "RETRY_MAYFAIL", "THISNODE", "NOMEMALLOC", "NOWARN"]
    for name in names:
        assert getattr(gfp, f"GFP_{name}") == getattr(gfp, f"__GFP_{name}")


def test_a_huge_page_request_may_not_use_reserves() -> None:
    assert gfp.GFP_TRANSHUGE & gfp.__GFP_NOMEMALLOC
    assert gfp.GFP_TRANSHUGE & gfp.__GFP_COMP
