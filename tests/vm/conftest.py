# SPDX-License-Identifier: GPL-2.0-only
"""A machine with Debian's tools, as far as preparing a guest needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.debian import Debian


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
    """Stand-ins for apt and dpkg, and nothing else on the PATH."""
    return Debian(tmp_path, monkeypatch)
