# SPDX-License-Identifier: GPL-2.0-only
"""One measured stretch: CPU time, wall time, host page faults, and hardware counts.

The hardware counts (instructions, cache misses) are those `perf stat` shows, read
through perf_event_open(2). Many virtual machines have none; then they are None and
the tables say "not available".
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hostzero.bench.perf_event import PerfGroup, open_perf

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measured stretch cost this process."""

    task_clock_ns: int
    """CPU time, user and system, of all threads of the process."""
    wall_ns: int
    host_faults: int
    """Page faults that the host kernel served, minor and major."""
    instructions: int | None = None
    cache_misses: int | None = None

    def __add__(self, other: Sample) -> Sample:
        """Return what two stretches of one phase cost together."""
        return Sample(
            self.task_clock_ns + other.task_clock_ns,
            self.wall_ns + other.wall_ns,
            self.host_faults + other.host_faults,
            _sum(self.instructions, other.instructions),
            _sum(self.cache_misses, other.cache_misses),
        )

    @property
    def task_clock_ms(self) -> float:
        """CPU time in milliseconds."""
        return self.task_clock_ns / _NS_PER_MS

    @property
    def wall_ms(self) -> float:
        """Wall time in milliseconds."""
        return self.wall_ns / _NS_PER_MS


class Stretch:
    """A stretch under measurement; it has its sample when the ``with`` block is left."""

    def __init__(self) -> None:
        """Begin without a sample."""
        self._sample: Sample | None = None

    @property
    def sample(self) -> Sample:
        """The measured values.

        Raises:
            RuntimeError: the stretch has not ended, or ended with an error.
        """
        if self._sample is None:
            raise RuntimeError("the stretch has no sample: it has not ended, or ended with an error")
        return self._sample


class Counters:
    """The counters of this process, opened once and read around each stretch.

    ::

        with Counters() as counters:
            with counters.measure() as stretch:
                work()
            print(stretch.sample.task_clock_ms)
    """

    def __init__(self, *, hardware: bool = True) -> None:
        """Open the hardware counters if the machine has them and `hardware` asks for them."""
        self._perf: PerfGroup | None = None
        self.hardware = "not asked for"
        """Which hardware counts are read: "user and kernel", "user only", or why there are none."""
        if hardware:
            self._perf, self.hardware = open_perf()

    @property
    def has_hardware(self) -> bool:
        """Whether samples carry instructions and cache misses."""
        return self._perf is not None

    @contextmanager
    def measure(self) -> Iterator[Stretch]:
        """Measure the ``with`` block.

        The garbage collector is off meanwhile: a full collection over what Numba keeps
        alive takes longer than some of the stretches.
        """
        stretch = Stretch()
        collecting = gc.isenabled()
        gc.disable()
        try:
            faults = _host_faults()
            if self._perf:
                self._perf.start()
            # The wall encloses the CPU time, so that their difference is never negative by the reading alone.
            wall = time.perf_counter_ns()
            cpu = time.clock_gettime_ns(time.CLOCK_PROCESS_CPUTIME_ID)
            yield stretch
            cpu = time.clock_gettime_ns(time.CLOCK_PROCESS_CPUTIME_ID) - cpu
            wall = time.perf_counter_ns() - wall
            counts = self._perf.stop() if self._perf else None
            stretch._sample = Sample(
                task_clock_ns=cpu,
                wall_ns=wall,
                host_faults=_host_faults() - faults,
                instructions=counts.instructions if counts else None,
                cache_misses=counts.cache_misses if counts else None,
            )
        finally:
            if collecting:
                gc.enable()

    def close(self) -> None:
        """Close the hardware counters; closing twice is harmless."""
        if self._perf:
            self._perf.close()
            self._perf = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sum(one: int | None, other: int | None) -> int | None:
    # A count that one of the stretches lacks is not the other's alone.
    return None if one is None or other is None else one + other


def _host_faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt
