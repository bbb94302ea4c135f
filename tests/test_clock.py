# SPDX-License-Identifier: GPL-2.0-only
"""Guest time moves only when it is turned, and work runs exactly when it is due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.clock import NSEC_PER_SEC, Clock


def test_work_runs_when_it_is_due_and_not_before() -> None:
    clock, ran = Clock(), list[int]()
    work = clock.delayed_work(lambda: ran.append(clock.now_ns))
    assert work.schedule(2.0)
    clock.advance(1.999_999_999)
    assert ran == []
    assert work.pending
    clock.advance(0.000_000_001)
    assert ran == [2 * NSEC_PER_SEC]
    assert not work.pending


def test_work_that_is_queued_is_not_queued_again() -> None:
    clock, ran = Clock(), list[int]()
    work = clock.delayed_work(lambda: ran.append(clock.now_ns))
    assert work.schedule(2.0)
    clock.advance(1.0)
    assert not work.schedule(2.0)
    clock.advance(10.0)
    assert ran == [2 * NSEC_PER_SEC]


def test_work_may_queue_itself_again() -> None:
    clock, ran = Clock(), list[int]()

    def again() -> None:
        ran.append(clock.now_ns // NSEC_PER_SEC)
        work.schedule(2.0)

    work = clock.delayed_work(again)
    work.schedule(2.0)
    clock.advance(7.0)
    assert ran == [2, 4, 6]
    assert work.pending


def test_flush_runs_queued_work_now_and_only_once() -> None:
    clock, ran = Clock(), list[int]()
    work = clock.delayed_work(lambda: ran.append(clock.now_ns))
    assert not work.flush()
    work.schedule(2.0)
    assert work.flush()
    clock.advance(5.0)
    assert ran == [0]


def test_cancelled_work_does_not_run_but_can_be_queued_anew() -> None:
    clock, ran = Clock(), list[int]()
    work = clock.delayed_work(lambda: ran.append(clock.now_ns))
    assert not work.cancel()
    work.schedule(2.0)
    assert work.cancel()
    clock.advance(1.0)
    work.schedule(3.0)  # the first queueing, due at 2 s, must not run this one
    clock.advance(10.0)
    assert ran == [4 * NSEC_PER_SEC]


def test_work_sees_the_time_at_which_it_is_due() -> None:
    clock, seen = Clock(), list[tuple[str, int]]()
    for name, delay in (("late", 3.0), ("early", 1.0), ("also early", 1.0)):
        clock.delayed_work(lambda name=name: seen.append((name, clock.now_ns))).schedule(delay)  # type: ignore[misc]
    clock.advance(5.0)
    second = NSEC_PER_SEC
    assert seen == [("early", second), ("also early", second), ("late", 3 * second)]
    assert clock.now_ns == 5 * second


def test_hooks_run_before_time_moves_and_after_each_piece_of_work() -> None:
    clock, seen = Clock(), list[int]()
    requests = [2.0]
    work = clock.delayed_work(lambda: requests.append(1.0))

    def queue_requests() -> None:
        seen.append(clock.now_ns // NSEC_PER_SEC)
        while requests and not work.pending:
            work.schedule(requests.pop())

    clock.before_advance(queue_requests)
    clock.advance(3.5)
    assert seen == [0, 2, 3]
    assert work.pending


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match=r"time cannot run backwards: advance\(-1\)"):
        Clock().advance(-1)


def test_no_time_at_all_runs_what_is_due_now() -> None:
    clock, ran = Clock(), list[int]()
    clock.delayed_work(lambda: ran.append(1)).schedule(0.0)
    clock.advance(0.0)
    assert ran == [1]


@given(st.lists(st.integers(0, 50), max_size=20), st.lists(st.integers(0, 9), max_size=20))
def test_work_runs_in_the_order_of_its_due_times(delays: list[int], turns: list[int]) -> None:
    clock, ran = Clock(), list[int]()
    for delay in delays:
        clock.delayed_work(lambda delay=delay: ran.append(delay)).schedule(delay)  # type: ignore[misc]
    for turn in turns:
        clock.advance(turn)
        assert ran == sorted(delay for delay in delays if delay <= clock.now_ns // NSEC_PER_SEC)


def test_work_that_lets_time_pass_does_not_turn_it_back() -> None:
    clock = Clock()
    work = clock.delayed_work(lambda: clock.advance(10))
    work.schedule(1)
    clock.advance(2)
    assert clock.now_ns == 11 * NSEC_PER_SEC
