# SPDX-License-Identifier: GPL-2.0-only
"""The scenarios that measure time: arms interleaved, phases measured, contents checked.

In each repetition every arm runs once, in an order drawn from the seed, so that a slow
minute of the machine hits all of them. A repetition of an arm boots three guests:

* one is populated and then touched: phases ``populate`` and ``populate+touch``;
* one is populated and then filled: ``populate+fill``;
* one churns: map, fill, unmap and give the memory away again, three times over. Giving it
  away is inside the measured stretch here, and only here.

Before the first repetition each scenario's arms run once unmeasured. There, and only
there, the populated memory is read back: an arm that zeroes must read as zero, byte for
byte. (Reading faults in what the host dropped, so a measured repetition cannot be checked.)
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hostzero.bench.arms import ARMS
from hostzero.bench.guest import PreparedGuest
from hostzero.bench.names import Arm, Phase, Scenario
from hostzero.bench.results import PageCounts
from hostzero.errors import VmBug

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hostzero.bench.context import Context
    from hostzero.bench.counters import Sample

CHURN_CYCLES: Final = 3

_GUESTS: Final = ("populate+touch", "populate+fill", "churn")


class TimedScenario:
    """One scenario's repetitions."""

    def __init__(self, scenario: Scenario, context: Context) -> None:
        """Take what the run shares."""
        self._scenario = scenario
        self._context = context
        self._options = context.options
        # A seed of its own, so that a scenario's order does not depend on which others run.
        self._random = random.Random(f"{self._options.seed} {scenario}")

    def run(self) -> None:
        """Measure every arm and phase.

        Raises:
            VmBug: populated memory that should be zero is not.
        """
        repetitions = self._options.repetitions
        self._context.progress.scenario(str(self._scenario), len(ARMS) * (1 + repetitions * len(_GUESTS)))
        for arm in ARMS:
            self._check(arm)
            self._context.progress.step(f"{arm}: contents checked")
        for repetition in range(1, repetitions + 1):
            order = list(ARMS)
            self._random.shuffle(order)
            for arm in order:
                for guest, measure in zip(_GUESTS, (self._touch, self._fill, self._churn), strict=True):
                    measure(arm)
                    self._context.progress.step(f"{arm}, {guest}, {repetition} of {repetitions}")

    @contextmanager
    def _guest(self, arm: Arm) -> Iterator[PreparedGuest]:
        with (
            self._context.host_memory() as ram,
            PreparedGuest(ram, self._scenario, arm, self._options.size) as guest,
        ):
            yield guest

    def _check(self, arm: Arm) -> None:
        # Also the first use of everything that is measured later: compiled code is loaded
        # from the disk at its first call, which must not fall into a measured stretch.
        with self._guest(arm) as guest:
            address = guest.map()
            guest.populate(address)
            found = None if arm is Arm.NO_ZEROING else guest.first_nonzero(address)
            if found is not None:
                raise VmBug(f"{self._scenario}/{arm}: address {found:#x} does not read as zero")
            guest.touch(address)
            guest.fill(address)
            guest.unmap(address)
            guest.give_away()

    def _touch(self, arm: Arm) -> None:
        with self._guest(arm) as guest:
            address = guest.map()
            populate = self._measure(guest, lambda: guest.populate(address))
            touch = self._measure(guest, lambda: guest.touch(address))
        self._add(arm, Phase.POPULATE, populate)
        self._add(arm, Phase.POPULATE_TOUCH, populate, touch)

    def _fill(self, arm: Arm) -> None:
        with self._guest(arm) as guest:
            address = guest.map()
            populate = self._measure(guest, lambda: guest.populate(address))
            fill = self._measure(guest, lambda: guest.fill(address))
        self._add(arm, Phase.POPULATE_FILL, populate, fill)

    def _churn(self, arm: Arm) -> None:
        def churn(guest: PreparedGuest) -> None:
            for _ in range(CHURN_CYCLES):
                address = guest.map()
                guest.fill(address)
                guest.unmap(address)
                guest.give_away()

        with self._guest(arm) as guest:
            measured = self._measure(guest, lambda: churn(guest), residency=False)
        self._add(arm, Phase.CHURN, measured)

    def _measure(
        self, guest: PreparedGuest, work: Callable[[], None], *, residency: bool = True
    ) -> tuple[Sample, PageCounts]:
        ram, mm = guest.machine.ram, guest.machine.mm
        resident = ram.resident() if residency else 0
        before = mm.vm_stats()
        with self._context.counters.measure() as stretch:
            work()
        after = mm.vm_stats()
        return stretch.sample, PageCounts(
            guest_zeroed=after.zeroed_bytes - before.zeroed_bytes,
            known_zero=after.known_zero_bytes - before.known_zero_bytes,
            host_returned=guest.returned,
            # Memory comes and goes within a churn: the growth would say nothing.
            host_faulted=ram.resident() - resident if residency else None,
        )

    def _add(self, arm: Arm, phase: Phase, *parts: tuple[Sample, PageCounts]) -> None:
        sample, pages = parts[0]
        for more, more_pages in parts[1:]:
            sample = sample + more
            pages = pages.plus(more_pages)
        self._context.results.series_for(self._scenario, arm, phase).add(sample, pages)
