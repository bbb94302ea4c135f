# SPDX-License-Identifier: GPL-2.0-only
"""Records as uncompiled code reads them: the same values as numpy's, only quicker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hostzero.mm.mmzone import PAGE_DTYPE, ZONE_DTYPE
from hostzero.mm.records import Records, as_records


@pytest.fixture
def both() -> tuple[Any, Any]:
    """The same four pages twice: as numpy's records, and as ours."""
    plain = np.zeros(4, dtype=PAGE_DTYPE)
    plain["private"] = [3, 1, 4, 1]
    return plain.view(np.recarray), plain.view(Records)


def test_a_record_reads_like_numpys(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    for name in PAGE_DTYPE.names or ():
        for at in (0, 3, -1, np.int64(2)):
            assert getattr(ours[at], name) == getattr(theirs[at], name)
            assert type(getattr(ours[at], name)) is int
            assert ours[at][name] == theirs[at][name]


def test_a_record_is_live(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    record = ours[2]
    theirs[2].private = 7
    assert record.private == 7
    record.flags_f |= 1 << 14
    assert theirs[2].flags_f == 1 << 14
    record["order"] = 9
    assert theirs[2].order == 9


def test_numbers_of_numpy_can_be_written() -> None:
    ours = np.zeros(2, dtype=PAGE_DTYPE).view(Records)
    ours[1].private = np.int64(-5)
    ours[1].zone = np.bool_(True)
    assert ours["private"].tolist() == [0, -5]
    assert ours[1].zone == 1


def test_a_record_can_be_copied(both: tuple[Any, Any]) -> None:
    _, ours = both
    ours[2:4] = ours[0]
    assert ours["private"].tolist() == [3, 1, 3, 3]
    copied = ours[1].copy()
    ours[1].private = 8
    assert copied.private == 1


def test_a_record_keeps_its_array() -> None:
    record = np.ones(2, dtype=PAGE_DTYPE).view(Records)[1]
    _ = [np.zeros(2, dtype=PAGE_DTYPE) for _ in range(64)]
    assert record.private == 1


def test_a_field_that_is_an_array_is_live_too() -> None:
    zones = np.zeros(2, dtype=ZONE_DTYPE).view(Records)
    zones[1].nr_free[3] += 5
    assert zones["nr_free"][1, 3] == 5
    assert zones.nr_free[1, 3] == 5


def test_columns_and_slices_are_numpys(both: tuple[Any, Any]) -> None:
    _, ours = both
    assert ours.private.tolist() == ours["private"].tolist() == [3, 1, 4, 1]
    assert ours[1:3].private.tolist() == [1, 4]
    part = ours[1:3]
    part[1].private = 9
    assert ours[2].private == 9


def test_what_does_not_exist_is_an_error(both: tuple[Any, Any]) -> None:
    _, ours = both
    with pytest.raises(IndexError):
        _ = ours[4]
    assert [int(record.private) for record in ours] == [3, 1, 4, 1]
    with pytest.raises(AttributeError):
        ours[0].no_such_field = 1


def test_the_form_suits_the_compiler() -> None:
    assert isinstance(as_records(np.zeros(1, dtype=PAGE_DTYPE)), np.recarray)
