# SPDX-License-Identifier: GPL-2.0-only
"""Front ends to test with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device.guest import ALL_FEATURES
from tests.vhost_user.backend import Pair, pair


@pytest.fixture
def idle() -> Iterator[Pair]:
    """A front end that has connected and said nothing."""
    with pair() as front_end:
        yield front_end


@pytest.fixture
def running() -> Iterator[Pair]:
    """A front end with a driver that runs and took every feature."""
    with pair(ALL_FEATURES) as front_end:
        yield front_end
