# SPDX-License-Identifier: GPL-2.0-only
"""Which features of a driver the device goes along with."""

from __future__ import annotations

import logging

from hostzero.device.metrics import BalloonMetrics
from hostzero.device.queue_server import LOG_LINES_MAX
from hostzero.virtio.features import Feature, names

_log = logging.getLogger(__name__)


def negotiate(offered: Feature, accepted: Feature, metrics: BalloonMetrics) -> bool:
    """Return whether FEATURES_OK may be set for what a driver accepts.

    It may not for a bit that was not offered (virtio 1.3, 2.2.2), nor without VERSION_1.

    Bit 6 without REPORTING is let through and means nothing then: the queue to which it belongs
    does not exist, so no claim can be made. Such a driver most likely means
    HINT_WAIT_ON_ACK, for which another proposal uses bit 6, and it works well without;
    refusing would cost it its balloon. It is logged and counted.
    """
    reason = ""
    if not_offered := int(accepted) & ~int(offered):
        reason = f"not offered: {', '.join(names(not_offered))}"
    elif Feature.VERSION_1 not in accepted:
        reason = "without VERSION_1"
    if reason:
        metrics.refused_negotiations += 1
        if metrics.refused_negotiations <= LOG_LINES_MAX:
            _log.warning("features %#x refused: %s", int(accepted), reason)
        return False
    if Feature.DEVICE_INIT_REPORTED in accepted and Feature.REPORTING not in accepted:
        metrics.orphan_init_reported += 1
        if metrics.orphan_init_reported <= LOG_LINES_MAX:
            _log.warning("the driver accepts bit 6 without reporting: it may mean HINT_WAIT_ON_ACK by it")
    return True
