# SPDX-License-Identifier: GPL-2.0-only
"""Queues and buffers are made together and go together."""

from __future__ import annotations

import pytest

from hostzero.driver.negotiate import accept, begin, reset
from hostzero.driver.queues import no_answer
from hostzero.driver.session import Session, init_vqs
from hostzero.errors import DriverError
from hostzero.virtio import Feature, QueueRole, queue_roles
from tests.driver.conftest import Guest, MakeGuest
from tests.driver.fakes import ALL_FEATURES


def open_session(guest: Guest, features: Feature) -> Session:
    begin(guest.device)
    accept(guest.device, features)
    return init_vqs(
        guest.mm,
        guest.memory,
        guest.device,
        features,
        stats_interrupt=lambda: None,
        wait=no_answer,
        broken=lambda error: None,
    )


@pytest.mark.parametrize("features", [Feature.VERSION_1, Feature.VERSION_1 | Feature.STATS_VQ, ALL_FEATURES])
def test_a_session_has_what_was_negotiated_and_frees_it(make_guest: MakeGuest, features: Feature) -> None:
    guest = make_guest(probe=False)
    before = guest.mm.nr_free
    session = open_session(guest, features)
    assert tuple(session.queues) == queue_roles(features)
    assert (session.stats is not None) == (Feature.STATS_VQ in features)
    assert (session.hint is not None) == (Feature.FREE_PAGE_HINT in features)
    assert guest.mm.nr_free < before
    reset(guest.device)
    session.free(guest.mm)
    assert guest.mm.nr_free == before


def test_the_buffers_go_if_the_queues_fail(make_guest: MakeGuest) -> None:
    guest = make_guest(probe=False, sizes={QueueRole.REPORTING: 5})
    before = guest.mm.nr_free
    with pytest.raises(DriverError, match="5 entries"):
        open_session(guest, ALL_FEATURES)
    assert guest.mm.nr_free == before


def test_balloon_pages_off_the_list_are_not_passed_over(make_guest: MakeGuest) -> None:
    """Freeing the rest in silence would lose them for good."""
    guest = make_guest(probe=False)
    session = open_session(guest, Feature.VERSION_1)
    guest.device.set_status(15)
    assert session.inflation.fill_balloon(5) == 5
    guest.mm.balloon.pages.clear()
    reset(guest.device)
    with pytest.raises(DriverError, match="5 balloon pages are gone"):
        session.free(guest.mm)
