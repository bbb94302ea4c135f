# SPDX-License-Identifier: GPL-2.0-only
"""What the balloon gives back when the guest runs out of memory.

The kernel has two ways: the shrinker returns hinted blocks, and the OOM notifier
(`virtio_balloon_oom_notify`, DEFLATE_ON_OOM) leaks 256 pages. This guest has one notifier
chain, so both are in one callback: hinted blocks first, because they cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from hostzero.driver.free_page_hint import FreePageHint
from hostzero.driver.inflate import Inflation
from hostzero.errors import HostzeroError
from hostzero.virtio.features import Feature

_log = logging.getLogger(__name__)

OOM_NR_PAGES: Final = 256
"""Pages to leak at once (kernel: `VIRTIO_BALLOON_OOM_NR_PAGES`)."""


def wants_oom_notifier(features: Feature) -> bool:
    """Return whether any negotiated feature has something to give back."""
    return bool(features & (Feature.DEFLATE_ON_OOM | Feature.FREE_PAGE_HINT))


def virtio_balloon_oom_notify(
    inflation: Inflation,
    hint: FreePageHint | None,
    features: Feature,
    update_balloon_size: Callable[[], None],
) -> int:
    """Give pages back and return how many.

    Called from the middle of an allocation. If that allocation is the balloon's own, its lock is
    held and nothing is leaked: the kernel deadlocked here before patch 28. A device that fails
    now frees nothing, which leaves the allocation where it was; the failure is recorded.
    """
    if inflation.locked:
        return 0
    freed = 0
    try:
        if hint is not None:
            freed += hint.shrink()
        if freed == 0 and Feature.DEFLATE_ON_OOM in features:
            freed += inflation.leak_balloon(OOM_NR_PAGES)
            update_balloon_size()
    except (HostzeroError, OSError) as error:
        _log.warning("out of memory, and the balloon cannot give pages back: %s", error)
    return freed
