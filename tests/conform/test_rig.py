# SPDX-License-Identifier: GPL-2.0-only
"""What every case expects, against devices that do not do it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostzero.conform.in_process import InProcessTarget, everything
from hostzero.conform.judge import Failed, Judge, Level
from hostzero.conform.rig import Rig, whole_pages
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.virtio.features import Feature, QueueRole
from tests.conform.wrong import balloon, others
from tests.conform.wrong.device import Make, WrongTarget


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(InProcessTarget(), Judge("5.5.6")) as rig:
        yield rig


def rig_of(make: Make) -> Rig:
    return Rig(WrongTarget(make), Judge("5.5.6"))


def test_claims_end_with_the_used_length(rig: Rig) -> None:
    rig.start()
    assert rig.claims(range(12), 1, b"\xff\xff") == (True,) * 8 + (False,) * 4
    assert rig.claims(range(3), 100, b"\x02") == (False, True, False)
    assert rig.claims(range(3), 0, b"\xff") == (False,) * 3


def test_without_bit_7_nothing_is_claimed(rig: Rig) -> None:
    rig.start(drop=Feature.DEVICE_INIT_ON_INFLATE)
    assert rig.claims(range(3), 1, b"\xff") == (False,) * 3


def test_a_false_claim_fails_the_inflate() -> None:
    with rig_of(balloon.claims_and_writes) as rig:
        rig.start()
        with pytest.raises(Failed, match="holds other bytes"):
            rig.inflate([rig.ram.pages(1)])


def test_a_false_length_fails_the_report() -> None:
    with rig_of(others.claims_without_dropping) as rig:
        rig.start()
        with pytest.raises(Failed, match="not all zero"):
            rig.report((rig.ram.pages(2) * PAGE_SIZE, PAGE_SIZE))


def test_silence_fails_and_says_how_many() -> None:
    with rig_of(balloon.silent_inflate) as rig:
        rig.start()
        with pytest.raises(Failed, match="1 of 1 requests on the inflate queue did not come back"):
            rig.inflate([rig.ram.pages(1)])


def test_a_length_beyond_the_buffer_fails() -> None:
    with rig_of(balloon.one_byte_more) as rig:
        rig.start()
        with pytest.raises(Failed, match="had 1 writable bytes"):
            rig.inflate([rig.ram.pages(1)])


def test_a_byte_that_nobody_gave_away_fails(rig: Rig) -> None:
    rig.start()
    rig.expect_untouched()
    rig.ram.memory.write(Gpa(rig.ram.last_pages(1) * PAGE_SIZE), b"!")
    with pytest.raises(Failed) as failed:
        rig.expect_untouched()
    assert failed.value.miss.level is Level.SAFETY


def test_a_request_that_breaks_a_rule_may_come_back(rig: Rig) -> None:
    rig.start()
    at = rig.ram.control(8)
    assert rig.provoke(QueueRole.INFLATE, [(at, 3)]) == 0
    rig.expect_recovered()
    assert rig.judge.misses == []


def test_silence_about_such_a_request_is_noted_and_a_reset_mends_it() -> None:
    with rig_of(balloon.keeps_ragged_inflate) as rig:
        rig.start()
        assert rig.provoke(QueueRole.INFLATE, [(rig.ram.control(8), 3)]) is None
        rig.expect_recovered()
        assert [miss.clause for miss in rig.judge.misses] == ["2.1.2"]


def test_another_device_is_fresh(rig: Rig) -> None:
    rig.start()
    rig.write_actual(7)
    page = rig.ram.pages(1)
    rig.connect()
    assert rig.config().actual == 0
    assert rig.ram.pages(1) == page
    rig.start()
    rig.expect_works()


def test_the_device_that_offers_everything_does() -> None:
    with InProcessTarget(everything).connect() as connection:
        assert connection.transport.device_features() & 0xFF == 0xFF


@pytest.mark.parametrize(
    ("gpa", "length", "pages"),
    [
        (0, PAGE_SIZE, range(1)),
        (0, PAGE_SIZE - 1, range(0)),
        (1, PAGE_SIZE, range(1, 1)),
        (1, 2 * PAGE_SIZE, range(1, 2)),
        (PAGE_SIZE, 3 * PAGE_SIZE, range(1, 4)),
    ],
)
def test_whole_pages(gpa: int, length: int, pages: range) -> None:
    assert list(whole_pages(gpa, length)) == list(pages)
