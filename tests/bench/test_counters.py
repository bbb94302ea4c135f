# SPDX-License-Identifier: GPL-2.0-only
"""What a sample counts, and what happens to a stretch that fails."""

from __future__ import annotations

import gc
import mmap

import pytest

from hostzero.bench.counters import Counters, Sample


def test_faults_of_the_stretch_are_counted() -> None:
    """Writing to n fresh pages without huge pages takes n faults, and nearly no others."""
    pages = 512
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE) as fresh, Counters() as counters:
        fresh.madvise(mmap.MADV_NOHUGEPAGE)
        with counters.measure() as stretch:
            for page in range(pages):
                fresh[page * mmap.PAGESIZE] = 1
        with counters.measure() as resident:
            for page in range(pages):
                fresh[page * mmap.PAGESIZE] = 1
    assert pages <= stretch.sample.host_faults < pages + 100
    assert resident.sample.host_faults < 100


def test_both_clocks_advance() -> None:
    with Counters(hardware=False) as counters, counters.measure() as stretch:
        sum(range(100_000))
    assert stretch.sample.task_clock_ns > 0
    assert stretch.sample.wall_ns > 0


def test_milliseconds() -> None:
    sample = Sample(task_clock_ns=1_500_000, wall_ns=2_250_000, host_faults=0)
    assert (sample.task_clock_ms, sample.wall_ms) == (1.5, 2.25)


def test_hardware_counts_are_there_exactly_when_the_counters_say_so() -> None:
    with Counters() as counters:
        with counters.measure() as stretch:
            sum(range(100_000))
        counted = stretch.sample.instructions is not None
        assert counted == counters.has_hardware
        assert (counters.hardware in {"user and kernel", "user only"}) == counted
        assert counters.hardware.startswith("not available") == (not counted)


def test_without_hardware_nothing_is_opened() -> None:
    with Counters(hardware=False) as counters:
        assert counters.hardware == "not asked for"
        assert not counters.has_hardware


def test_a_stretch_has_no_sample_before_its_end() -> None:
    with (
        Counters(hardware=False) as counters,
        counters.measure() as stretch,
        pytest.raises(RuntimeError, match="no sample"),
    ):
        _ = stretch.sample


def test_a_failed_stretch_has_no_sample_and_restores_the_collector() -> None:
    assert gc.isenabled()
    with Counters(hardware=False) as counters:
        with pytest.raises(ZeroDivisionError), counters.measure() as stretch:
            _ = 1 // (0 if not gc.isenabled() else 1)
        with pytest.raises(RuntimeError, match="no sample"):
            _ = stretch.sample
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with Counters(hardware=False) as counters, counters.measure():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_closing_twice_is_harmless() -> None:
    counters = Counters()
    counters.close()
    counters.close()
    assert not counters.has_hardware
