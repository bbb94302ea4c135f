# SPDX-License-Identifier: GPL-2.0-only
"""The counters as text keys and integers, and the table that explains them."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from hostzero.device import metrics
from hostzero.device.metrics import DISCARD_SIZE_BOUNDS, BalloonMetrics, QueueMetrics, SkipReason
from hostzero.units import PAGE_SIZE, PMD_SIZE
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


@pytest.mark.parametrize(
    ("length", "place"),
    [
        (PAGE_SIZE, 0),
        (2 * PAGE_SIZE, 1),
        (8 * PAGE_SIZE, 1),
        (9 * PAGE_SIZE, 2),
        (PMD_SIZE, 3),
        (2 * PMD_SIZE, 4),
        (1 << 30, 6),
        ((1 << 30) + PAGE_SIZE, 7),
    ],
)
def test_a_discard_is_counted_under_its_size(length: int, place: int) -> None:
    """The place is that of the first bound that is not below the length."""
    queue = QueueMetrics()
    queue.discard(length)
    assert [at for at, count in enumerate(queue.discard_sizes) if count] == [place]
    assert (queue.discard_calls, queue.discarded_bytes) == (1, length)


def test_the_sizes_add_up_to_the_calls() -> None:
    queue = QueueMetrics()
    for step in range(30):
        queue.discard(PAGE_SIZE << step)
    assert sum(queue.discard_sizes) == queue.discard_calls == 30
    assert len(queue.discard_sizes) == len(DISCARD_SIZE_BOUNDS) + 1


def test_a_copy_of_the_counters_stays_as_it_was() -> None:
    """`as_dict` is a picture, also of the one counter that is a list."""
    counters = BalloonMetrics()
    picture = counters.as_dict()
    counters.inflate.discard(PAGE_SIZE)
    assert sum(picture["inflate"]["discard_sizes"]) == 0  # type: ignore[index]
