# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from hostzero.errors import VmError
from hostzero.vm.wait import wait_for


def test_the_first_true_thing_is_returned() -> None:
    looks = iter([None, 0, "", "there", "later"])
    assert wait_for(lambda: next(looks), "it", 5, interval=0) == "there"


def test_a_deadline_says_what_was_waited_for() -> None:
    with pytest.raises(VmError, match=r"the moon: not within 0.01 s"):
        wait_for(lambda: None, "the moon", 0.01, interval=0)


def test_it_looks_at_least_once() -> None:
    assert wait_for(lambda: True, "it", 0)
