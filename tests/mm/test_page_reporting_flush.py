# SPDX-License-Identifier: GPL-2.0-only
"""`/sys/module/page_reporting/parameters/flush`: reporting now instead of in two seconds (patch 29)."""

from __future__ import annotations

import errno

import pytest

from hostzero.errors import MmError
from hostzero.mm import MemoryManager
from hostzero.mm.buddy import PAGE_REPORTING_REQUESTED
from hostzero.mm.kstrtox import UINT_MAX
from tests.mm.conftest import Boot
from tests.mm.guest import verify
from tests.mm.processes import (
    Entries,
    FakeHost,
    release_blocks,
)
from tests.mm.reporting import SCATTERED, two_zones, with_blocks


def test_flush_reports_at_least_its_budget(scattered: MemoryManager) -> None:
    """A pass reports three blocks here; flush overshoots to whole rounds of one or two passes."""
    host = FakeHost(scattered, capacity=1, order=4).register()
    scattered.page_reporting.process()
    count = scattered.page_reporting.flush(4)
    assert 4 <= count <= 9
    assert len(host.blocks()) == 3 + count
    assert len(host.blocks()) < 32


@pytest.mark.parametrize("budget", [32, 33, 1 << 31, UINT_MAX])
def test_flush_ends_when_nothing_is_left(scattered: MemoryManager, budget: int) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    assert scattered.page_reporting.flush(budget) == 32
    assert sorted(host.blocks()) == sorted(SCATTERED)
    assert scattered.page_reporting.flush(budget) == 0
    scattered.clock.advance(100)
    assert len(host.blocks()) == 32


def test_flush_of_nothing_does_nothing(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, order=4).register()
    assert scattered.page_reporting.flush(0, signal_pending=lambda: True) == 0
    assert host.calls == []
    assert scattered.page_reporting.state == PAGE_REPORTING_REQUESTED


@pytest.mark.parametrize("budget", [-1, UINT_MAX + 1, 2**64 - 1, 2**64])
def test_a_budget_beyond_an_unsigned_int_is_refused(scattered: MemoryManager, budget: int) -> None:
    """Refused as `kstrtouint` does, not clamped and not wrapped around to something small."""
    host = FakeHost(scattered, order=4).register()
    with pytest.raises(ValueError, match="unsigned"):
        scattered.page_reporting.flush(budget)
    assert host.calls == []


def test_the_parameter_is_written_as_text(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    scattered.page_reporting.param_set_flush("0\n")
    assert host.calls == []
    scattered.page_reporting.param_set_flush("0x20\n")
    assert len(host.blocks()) == 32


@pytest.mark.parametrize(
    ("text", "error"),
    [("", errno.EINVAL), ("many", errno.EINVAL), ("-1", errno.EINVAL), ("4294967296", errno.ERANGE)],
)
def test_what_is_no_number_reports_nothing(scattered: MemoryManager, text: str, error: int) -> None:
    host = FakeHost(scattered, order=4).register()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        scattered.page_reporting.param_set_flush(text)
    assert (caught.value.errno, host.calls) == (error, [])


def test_a_signal_ends_a_written_parameter_too(scattered: MemoryManager) -> None:
    FakeHost(scattered, order=4).register()
    with pytest.raises(InterruptedError):
        scattered.page_reporting.param_set_flush("1", lambda: True)


def test_a_flush_from_inside_a_report_is_refused(scattered: MemoryManager) -> None:
    """The parameter lock is held, and the pass that would be waited for is the caller's own."""
    host = FakeHost(scattered, capacity=8, order=4).register()
    refused: list[str] = []

    def flush_again(call: Entries) -> None:
        with pytest.raises(MmError, match="a deadlock") as caught:
            scattered.page_reporting.flush(1)
        refused.append(str(caught.value))

    host.during = flush_again
    assert scattered.page_reporting.flush(UINT_MAX) == 32
    assert len(refused) == len(host.calls) > 0
    release_blocks(scattered, [(640, 4)])
    scattered.clock.advance(2)
    assert len(refused) == len(host.calls)
    verify(scattered)
    # The lock was given back, also after a signal.
    with pytest.raises(InterruptedError):
        scattered.page_reporting.flush(1, lambda: True)
    assert scattered.page_reporting.flush(1) == 0


def test_a_device_that_lets_its_refused_flush_fail_the_report(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=8, order=4).register()

    def flush_again(call: Entries) -> None:
        scattered.page_reporting.flush(1)

    host.during = flush_again
    assert scattered.page_reporting.flush(UINT_MAX) == 0
    assert scattered.page_reporting.failed_calls == len(host.calls) > 0
    verify(scattered)


def test_flush_without_a_device_returns_zero(mm: MemoryManager) -> None:
    assert mm.page_reporting.flush(UINT_MAX) == 0


def test_a_signal_ends_a_flush(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=1, order=4).register()
    with pytest.raises(InterruptedError):
        scattered.page_reporting.flush(32, signal_pending=lambda: len(host.calls) >= 6)
    assert 6 <= len(host.calls) < 32
    with pytest.raises(InterruptedError):
        scattered.page_reporting.flush(1, signal_pending=lambda: True)


def test_flush_is_not_absorbed_by_a_pass_that_is_queued(boot: Boot) -> None:
    """Patch 29's double flush: a pass that finds nothing does not end the round."""
    mm = with_blocks(two_zones(boot), [(1024, 4)])
    host = FakeHost(mm, capacity=1, order=3).register()
    # The pass that is pending since registration fails; flush runs it, and one of its own.
    errors: list[BaseException | None] = [OSError("first call fails"), None, None]

    def next_error(call: Entries) -> None:
        host.fail = errors.pop(0)

    host.during = next_error
    assert mm.page_reporting.flush(1) == 1
    assert host.calls == [[(1024, 4)], [(1024, 4)]]


def test_flush_while_idle_runs_at_once(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    scattered.clock.advance(2)
    release_blocks(scattered, [(640, 2), (644, 2), (648, 3)])
    assert scattered.page_reporting.flush(1) == 1
    assert host.calls[1:] == [[(640, 4)]]
    scattered.clock.advance(100)
    assert len(host.calls) == 2


def test_flush_makes_a_pass_when_none_is_queued(scattered: MemoryManager) -> None:
    """What a smaller order makes worth reporting is no free, and so queues nothing by itself."""
    host = FakeHost(scattered, capacity=32, order=5).register()
    scattered.clock.advance(2)
    assert host.calls == []
    scattered.page_reporting.order = 4
    assert scattered.page_reporting.flush(1) >= 1
    assert set(host.blocks()) <= set(SCATTERED)


def test_flush_ends_with_a_device_that_always_fails(scattered: MemoryManager) -> None:
    host = FakeHost(scattered, capacity=32, order=4).register()
    host.fail = OSError("device gone")
    assert scattered.page_reporting.flush(UINT_MAX) == 0
    assert 1 <= len(host.calls) <= 2
