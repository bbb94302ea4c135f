# SPDX-License-Identifier: GPL-2.0-only
"""Feature names and numbers, and which queue gets which index."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.errors import UsageError
from hostzero.virtio import Feature, QueueRole, adjust_features, names, parse_features, queue_roles


def test_bit_numbers_are_those_of_the_kernel_and_of_the_series() -> None:
    assert {feature.name: feature.value.bit_length() - 1 for feature in Feature} == {
        "MUST_TELL_HOST": 0,
        "STATS_VQ": 1,
        "DEFLATE_ON_OOM": 2,
        "FREE_PAGE_HINT": 3,
        "PAGE_POISON": 4,
        "REPORTING": 5,
        "DEVICE_INIT_REPORTED": 6,
        "DEVICE_INIT_ON_INFLATE": 7,
        "RING_INDIRECT_DESC": 28,
        "RING_EVENT_IDX": 29,
        "VERSION_1": 32,
        "ACCESS_PLATFORM": 33,
    }


@pytest.mark.parametrize(
    "text",
    [
        "stats-vq,reporting",
        " STATS_VQ , Reporting,",
        "VIRTIO_BALLOON_F_STATS_VQ,VIRTIO_BALLOON_F_PAGE_REPORTING",
        "reporting,stats-vq,stats_vq",
    ],
)
def test_parse_reads_every_spelling(text: str) -> None:
    assert parse_features(text) == Feature.STATS_VQ | Feature.REPORTING


def test_parse_reads_ring_and_transport_names() -> None:
    text = "VIRTIO_F_VERSION_1,VIRTIO_RING_EVENT_IDX,VIRTIO_F_ACCESS_PLATFORM"
    assert parse_features(text) == Feature.VERSION_1 | Feature.RING_EVENT_IDX | Feature.ACCESS_PLATFORM


def test_parse_of_nothing_is_no_feature() -> None:
    assert parse_features("") == Feature(0)


def test_parse_names_the_word_that_it_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"'page-reprting' is not a feature; known are must-tell-host, .*"):
        parse_features("stats-vq,page-reprting")


@given(st.sets(st.sampled_from(list(Feature))))
def test_names_and_parse_are_inverse(chosen: set[Feature]) -> None:
    features = Feature(sum(chosen))
    assert parse_features(",".join(names(features))) == features


def test_a_bit_without_a_name_is_named_by_its_number() -> None:
    assert names(1 << 50 | Feature.VERSION_1) == ["version-1", "bit-50"]


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_queues_are_numbered_densely_for_every_subset(wanted: tuple[bool, bool, bool]) -> None:
    """Inflate and deflate are always 0 and 1; the others follow in order without a gap."""
    optional = [
        (Feature.STATS_VQ, QueueRole.STATS),
        (Feature.FREE_PAGE_HINT, QueueRole.FREE_PAGE),
        (Feature.REPORTING, QueueRole.REPORTING),
    ]
    acked = Feature.VERSION_1 | Feature.DEVICE_INIT_ON_INFLATE
    expected = [QueueRole.INFLATE, QueueRole.DEFLATE]
    for (feature, role), want in zip(optional, wanted, strict=True):
        if want:
            acked |= feature
            expected.append(role)
    assert queue_roles(acked) == tuple(expected)


def test_reporting_is_queue_3_with_statistics_and_without_hinting() -> None:
    """As seen with a stock Linux 7.2 guest that acknowledged bits 1 and 5."""
    assert queue_roles(Feature.STATS_VQ | Feature.REPORTING).index(QueueRole.REPORTING) == 3


def test_a_list_replaces_the_default_and_signs_change_it() -> None:
    default = Feature.STATS_VQ | Feature.REPORTING
    assert adjust_features("page-poison", default) == Feature.PAGE_POISON
    assert adjust_features("", default) == Feature(0)
    assert adjust_features("+page-poison,-stats-vq", default) == Feature.REPORTING | Feature.PAGE_POISON
    assert adjust_features(" -reporting , +VIRTIO_BALLOON_F_REPORTING", default) == default


@pytest.mark.parametrize("text", ["+reporting,stats-vq", "+", "+no-such", "--reporting"])
def test_changes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError):
        adjust_features(text, Feature(0))
