# SPDX-License-Identifier: GPL-2.0-only
"""The driver's policy on features, over every subset of bits and every kind of guest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from hostzero.driver.validate import (
    DRIVER_FEATURES,
    PAGE_POISON_VAL,
    GuestFacts,
    refused,
    virtballoon_validate,
)
from hostzero.virtio.features import Feature

GUESTS = [
    GuestFacts(init_on_free=init, page_poisoning=poison, confidential=confidential)
    for init, poison, confidential in itertools.product((False, True), repeat=3)
]

BITS = tuple(Feature)


def subsets() -> Iterator[int]:
    """Every subset of the twelve known bits."""
    for chosen in itertools.product((False, True), repeat=len(BITS)):
        yield sum(int(bit) for bit, on in zip(BITS, chosen, strict=True) if on)


def slow_validate(offered: int, guest: GuestFacts) -> set[str]:
    """Say for each bit by itself when it is accepted, in words of the sources, sharing no table."""
    has = {bit.name for bit in Feature if offered & int(bit)}
    poisoned = guest.page_poisoning
    filled = guest.page_poisoning or guest.init_on_free
    reporting = "REPORTING" in has and (not filled or "PAGE_POISON" in has)
    accepted = {
        "MUST_TELL_HOST": True,
        "STATS_VQ": True,
        "DEFLATE_ON_OOM": True,
        "FREE_PAGE_HINT": True,
        "PAGE_POISON": filled,
        "REPORTING": reporting,
        "DEVICE_INIT_REPORTED": reporting and not poisoned and not guest.confidential,
        "DEVICE_INIT_ON_INFLATE": not poisoned and not guest.confidential,
        "RING_INDIRECT_DESC": False,
        "RING_EVENT_IDX": True,
        "VERSION_1": True,
        "ACCESS_PLATFORM": False,
    }
    return {name for name in has if name is not None and accepted[name]}


@pytest.mark.parametrize("guest", GUESTS, ids=repr)
def test_every_subset_agrees_with_the_slow_twin(guest: GuestFacts) -> None:
    """4,096 subsets for each of eight guests, against a twin without the table of rules."""
    for offered in subsets():
        got = virtballoon_validate(offered, guest)
        assert {bit.name for bit in got} == slow_validate(offered, guest), f"offered {offered:#x}"


@pytest.mark.parametrize("guest", GUESTS, ids=repr)
def test_properties_of_every_subset(guest: GuestFacts) -> None:
    """What must hold whatever the rules are: no bit appears from nowhere, bit 6 needs REPORTING."""
    for offered in subsets():
        got = virtballoon_validate(offered, guest)
        assert int(got) & ~offered == 0
        assert virtballoon_validate(int(got), guest) == got, "validating twice changes nothing"
        if Feature.DEVICE_INIT_REPORTED in got:
            assert Feature.REPORTING in got
        if got & (Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE):
            assert not guest.confidential
            assert not guest.page_poisoning
        assert not got & (Feature.RING_INDIRECT_DESC | Feature.ACCESS_PLATFORM)


@pytest.mark.parametrize("guest", GUESTS, ids=repr)
def test_refused_is_the_difference_with_one_reason_each(guest: GuestFacts) -> None:
    for offered in subsets():
        reasons = refused(offered, guest)
        bits = [bit for bit, _ in reasons]
        assert len(set(bits)) == len(bits)
        assert sum(int(bit) for bit in bits) == offered & ~int(virtballoon_validate(offered, guest))
        assert all(why for _, why in reasons)


def test_bits_without_a_name_are_never_accepted() -> None:
    """A device may offer anything in 64 bits."""
    everything = (1 << 64) - 1
    assert virtballoon_validate(everything, GuestFacts()) == DRIVER_FEATURES & ~Feature.PAGE_POISON
    for bit in range(64):
        assert int(virtballoon_validate(1 << bit, GuestFacts())) & ~int(DRIVER_FEATURES) == 0


def test_the_whole_offer_in_each_kind_of_guest() -> None:
    """The rows of the documentation, written out."""
    init_bits = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
    every = int(DRIVER_FEATURES)
    plain = virtballoon_validate(every, GuestFacts())
    assert plain == DRIVER_FEATURES & ~Feature.PAGE_POISON
    assert virtballoon_validate(every, GuestFacts(init_on_free=True)) == DRIVER_FEATURES
    assert virtballoon_validate(every, GuestFacts(page_poisoning=True)) == DRIVER_FEATURES & ~init_bits
    assert virtballoon_validate(every, GuestFacts(confidential=True)) == plain & ~init_bits


@pytest.mark.parametrize(
    ("guest", "value"),
    [
        (GuestFacts(init_on_free=True), 0),
        (GuestFacts(page_poisoning=True), PAGE_POISON_VAL),
        (GuestFacts(init_on_free=True, page_poisoning=True), PAGE_POISON_VAL),
    ],
)
def test_poison_value_is_what_freed_pages_really_hold(guest: GuestFacts, value: int) -> None:
    """Poisoning switches init_on_free off, so with both the value is the poison."""
    assert guest.poison_val == value
    assert guest.want_init_on_free == (value == 0)


def test_init_on_free_without_page_poison_loses_reporting_and_so_bit_6() -> None:
    """The chain of two rules: REPORTING goes first, and bit 6 follows it."""
    offered = Feature.REPORTING | Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
    guest = GuestFacts(init_on_free=True)
    assert virtballoon_validate(int(offered), guest) == Feature.DEVICE_INIT_ON_INFLATE
    assert [bit for bit, _ in refused(int(offered), guest)] == [
        Feature.REPORTING,
        Feature.DEVICE_INIT_REPORTED,
    ]


@pytest.mark.parametrize("guest", GUESTS, ids=repr)
def test_indirect_descriptors_are_never_accepted(guest: GuestFacts) -> None:
    """Patch 28: whatever else is offered, and in every kind of guest."""
    offered = int(DRIVER_FEATURES | Feature.RING_INDIRECT_DESC)
    assert Feature.RING_INDIRECT_DESC not in virtballoon_validate(offered, guest)
    assert refused(offered, guest)[0][0] == Feature.RING_INDIRECT_DESC
