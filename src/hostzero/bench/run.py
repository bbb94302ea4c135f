# SPDX-License-Identifier: GPL-2.0-only
"""One run: every scenario that was asked for, each by what runs its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from hostzero import warmup
from hostzero.bench.context import Context
from hostzero.bench.counters import Counters
from hostzero.bench.fragmented import FragmentedScenario
from hostzero.bench.memcg_limit import MemcgLimitScenario
from hostzero.bench.names import TIMED, Scenario
from hostzero.bench.results import Results
from hostzero.bench.timed import TimedScenario
from hostzero.host import describe_host

if TYPE_CHECKING:
    from hostzero.bench.options import BenchOptions
    from hostzero.bench.progress import Progress

RUNNERS: Final[Mapping[Scenario, Callable[[Scenario, Context], None]]] = MappingProxyType(
    dict.fromkeys(TIMED, lambda scenario, context: TimedScenario(scenario, context).run())
    | {
        Scenario.FRAGMENTED: lambda _, context: FragmentedScenario(context).run(),
        Scenario.MEMCG_LIMIT: lambda _, context: MemcgLimitScenario(context).run(),
    }
)
"""What runs each scenario: it measures, and puts what it found into `Context.results`."""


def run_bench(options: BenchOptions, progress: Progress) -> Results:
    """Run the scenarios of `options` and return every value measured.

    Raises:
        BackingUnavailable: the host lacks the backing or the memory.
        VmBug: populated memory that should be zero is not.
    """
    warmup.warm_up(progress.scenario, progress.step)
    with Counters() as counters:
        results = Results(host=describe_host(hardware_counters=counters.hardware), config=options.to_config())
        for scenario in options.scenarios:
            RUNNERS[scenario](scenario, Context(options, counters, results, progress))
    return results
