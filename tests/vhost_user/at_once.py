# SPDX-License-Identifier: GPL-2.0-only
"""What must not wait for a peer: done beside the test, so that one that waits fails and hangs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable


def at_once(act: Callable[[], object]) -> None:
    """Do something that ends soon, whatever a peer does."""
    doing = threading.Thread(target=act, daemon=True)
    doing.start()
    doing.join(10.0)
    assert not doing.is_alive()
