# SPDX-License-Identifier: GPL-2.0-only
"""A recorded status, and the same device a while later."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "status.json"


def recorded() -> dict[str, Any]:
    """Return the status of a guest in the middle of an inflate."""
    status: dict[str, Any] = json.loads(RECORDED.read_text())
    return status


def later() -> dict[str, Any]:
    """Return the same guest after 256 more requests of 1 MiB."""
    status = copy.deepcopy(recorded())
    inflate = status["metrics"]["device"]["inflate"]
    inflate["requests"] += 256
    for counter in ("discarded_bytes", "proven_zero_bytes", "claimed_zero_bytes"):
        inflate[counter] += 256 << 20
    status["device"]["actual_bytes"] += 256 << 20
    status["device"]["guest_bytes"] -= 256 << 20
    return status
