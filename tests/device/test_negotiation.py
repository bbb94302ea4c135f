# SPDX-License-Identifier: GPL-2.0-only
"""Every way to accept or refuse features, and what is said about it."""

from __future__ import annotations

import logging

import pytest

from hostzero.device.metrics import BalloonMetrics
from hostzero.device.negotiation import negotiate
from hostzero.device.queue_server import LOG_LINES_MAX
from hostzero.virtio.features import Feature

OFFERED = Feature.VERSION_1 | Feature.REPORTING | Feature.DEVICE_INIT_REPORTED | Feature.FREE_PAGE_HINT


@pytest.mark.parametrize(
    ("accepted", "text"),
    [
        (Feature.VERSION_1, ""),
        (OFFERED, ""),
        (Feature.REPORTING, "features 0x20 refused: without VERSION_1"),
        (OFFERED | Feature.STATS_VQ | Feature(1 << 50), "not offered: stats-vq, bit-50"),
    ],
)
def test_accepted_or_refused_with_the_reason(
    caplog: pytest.LogCaptureFixture, accepted: Feature, text: str
) -> None:
    metrics = BalloonMetrics()
    assert negotiate(OFFERED, accepted, metrics) is (text == "")
    assert metrics.refused_negotiations == (text != "")
    assert text in caplog.text
    assert bool(caplog.records) is bool(text)


@pytest.mark.parametrize("accepted", [Feature.REPORTING, Feature.VERSION_1 | Feature.DEVICE_INIT_REPORTED])
def test_a_driver_that_tries_for_ever_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, accepted: Feature
) -> None:
    metrics = BalloonMetrics()
    with caplog.at_level(logging.WARNING, "hostzero.device"):
        for _ in range(LOG_LINES_MAX + 3):
            negotiate(OFFERED, accepted, metrics)
    assert len(caplog.records) == LOG_LINES_MAX
    assert metrics.refused_negotiations + metrics.orphan_init_reported == LOG_LINES_MAX + 3
