# SPDX-License-Identifier: GPL-2.0-only
"""The counters as text keys and integers, and the table that explains them."""

from __future__ import annotations

import json
from dataclasses import fields

from hostzero.device import metrics
from hostzero.device.metrics import BalloonMetrics, QueueMetrics, SkipReason
from hostzero.virtio.features import QueueRole


def test_as_dict_has_every_counter_and_survives_json() -> None:
    counters = BalloonMetrics()
    counters.inflate.skip(SkipReason.INHIBITED, 4096)
    counters.reporting.claims = 3
    counters.resets = 1
    data = counters.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["inflate"]["skipped_bytes"]["inhibited"] == 4096  # type: ignore[index]
    assert data["reporting"]["claims"] == 3  # type: ignore[index]
    assert set(data) == {role.value for role in QueueRole} | {
        counter.name for counter in fields(BalloonMetrics) if counter.name != "queues"
    }


def test_totals_are_over_all_queues() -> None:
    counters = BalloonMetrics()
    for number, queue in enumerate((counters.inflate, counters.deflate, counters.stats, counters.free_page)):
        queue.requests = queue.malformed = queue.discarded_bytes = 10**number
        queue.proven_zero_bytes = queue.claimed_zero_bytes = 2 * 10**number
    assert (counters.requests, counters.malformed, counters.discarded_bytes) == (1111, 1111, 1111)
    assert (counters.proven_zero_bytes, counters.claimed_zero_bytes) == (2222, 2222)


def test_every_counter_is_explained() -> None:
    """A counter without a line in the table of the module is a number that nobody can read."""
    for counter in [*fields(QueueMetrics), *fields(BalloonMetrics)]:
        if counter.name != "queues":
            assert f"``{counter.name}`` " in (metrics.__doc__ or ""), counter.name


def test_two_queues_do_not_share_their_skip_counters() -> None:
    counters = BalloonMetrics()
    counters.inflate.skip(SkipReason.POISON, 1)
    assert counters.reporting.skipped_bytes[SkipReason.POISON] == 0
