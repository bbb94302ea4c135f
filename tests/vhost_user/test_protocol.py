# SPDX-License-Identifier: GPL-2.0-only
"""Requests by their names."""

from __future__ import annotations

from hostzero.vhost_user.protocol import name_of


def test_names_of_requests() -> None:
    assert name_of(5) == "SET_MEM_TABLE (5)"
    assert name_of(77) == "77"
