# SPDX-License-Identifier: GPL-2.0-only
"""The played searches, for every test of this directory."""

from __future__ import annotations

from tests.check.played import played

__all__ = ["played"]
