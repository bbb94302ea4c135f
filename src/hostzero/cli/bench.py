# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero bench``: options in, tables and files out; the work is in `hostzero.bench`."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hostzero.bench.options import (
    BACKINGS,
    PLOT_SUFFIXES,
    SCENARIOS,
    BenchOptions,
    check_plot,
    quick_options,
    size_option,
)
from hostzero.cli.output import PATH, check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.errors import UsageError
from hostzero.units import format_size

_FULL = BenchOptions()
_QUICK = quick_options()
_NOT_WITH_ALLOCATOR = ("scenarios", "memory", "size", "seed", "backing", "plot", "markdown")


@click.command(name="bench")
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice([str(scenario) for scenario in SCENARIOS]),
    help=(
        "Which scenario to run; may be given more than once.  "
        f"[default: {', '.join(_FULL.scenarios)}; the others count instead of timing]"
    ),
)
@click.option("--memory", metavar="SIZE", help=f"The guest's memory.  [default: {format_size(_FULL.memory)}]")
@click.option(
    "--size", metavar="SIZE", help=f"What a process populates.  [default: {format_size(_FULL.size)}]"
)
@click.option(
    "--repetitions", type=int, metavar="N", help=f"Repetitions of each arm.  [default: {_FULL.repetitions}]"
)
@click.option("--seed", type=int, metavar="N", help=f"Orders the arms.  [default: {_FULL.seed}]")
@click.option(
    "--backing", type=click.Choice(BACKINGS), help=f"What holds guest memory.  [default: {_FULL.backing}]"
)
@click.option(
    "--quick",
    is_flag=True,
    help=(
        f"Under 30 seconds: {', '.join(_QUICK.scenarios)}, {format_size(_QUICK.memory)}, "
        f"{format_size(_QUICK.size)}, {_QUICK.repetitions} repetitions, unless given."
    ),
)
@click.option("--json", "json_path", type=PATH, help="Write all values; - is stdout.")
@click.option(
    "--plot",
    type=PATH,
    help=f"Draw the results into a file ({', '.join(PLOT_SUFFIXES)}).",
)
@click.option("--markdown", type=PATH, help="Write a summary, as the README has it; - is stdout.")
@click.option("--allocator", is_flag=True, help="Measure the allocator alone, in nanoseconds per block.")
def command(
    *,
    quick: bool,
    json_path: Path | None,
    plot: Path | None,
    markdown: Path | None,
    allocator: bool,
    **given: Any,
) -> None:
    """Measure what known-zero pages save, and what it leaves out.

    Four arms run interleaved: memory never given to the host, given and zeroed twice (baseline),
    given and zeroed once (optimized), and never zeroed by the guest (control). Tables go to
    standard output, progress to standard error.

    Two scenarios count instead of timing: fragmented, the share of allocations served from
    known-zero pages over the degree of fragmentation, with another seed each repetition; and
    memcg-limit, the bytes zeroed in vain when a memory cgroup is at its limit.
    """
    given = {name: value for name, value in given.items() if value not in {None, ()}}
    if allocator:
        files = {"plot": plot, "markdown": markdown}
        clash = [name for name in _NOT_WITH_ALLOCATOR if name in given or files.get(name)]
        if clash:
            names = ", ".join(f"--{'scenario' if name == 'scenarios' else name}" for name in clash)
            raise UsageError(f"--allocator measures the allocator alone: leave out {names}")
    options = _options(quick, given)
    check_outputs({"--json": json_path, "--markdown": markdown})
    if plot is not None:
        check_plot(plot)
    if allocator:
        _run_allocator(options.repetitions, json_path)
    else:
        _run_scenarios(options, json_path, plot, markdown)


def _options(quick: bool, given: Mapping[str, Any]) -> BenchOptions:
    values = dict(given)
    for name in ("memory", "size"):
        if name in values:
            values[name] = size_option(f"--{name}", values[name])
    if "scenarios" in values:
        named = {str(scenario): scenario for scenario in SCENARIOS}
        values["scenarios"] = tuple(named[name] for name in dict.fromkeys(values["scenarios"]))
    options = dataclasses.replace(_QUICK if quick else _FULL, **values)
    options.validate()
    return options


def _run_scenarios(
    options: BenchOptions, json_path: Path | None, plot: Path | None, markdown: Path | None
) -> None:
    from hostzero.host import available_memory

    options.validate_on(available_memory())
    from hostzero.bench.markdown import to_markdown
    from hostzero.bench.plot import write_plot
    from hostzero.bench.progress import open_progress
    from hostzero.bench.run import run_bench
    from hostzero.bench.table import print_results

    with open_progress() as progress:
        results = run_bench(options, progress)
    # Files first: a reader of the tables may go away, as `| head` does.
    if plot is not None:
        write_plot(results, plot)
    if markdown is not None:
        today = dt.date.today().isoformat()
        write_output(markdown, to_markdown(results, today))
    write_output(json_path, to_json(results.to_document()))
    print_results(results, console_beside(json_path, markdown))


def _run_allocator(repetitions: int, json_path: Path | None) -> None:
    from hostzero.bench.allocator import run_allocator
    from hostzero.bench.progress import open_progress
    from hostzero.bench.table import print_allocator

    with open_progress() as progress:
        results = run_allocator(repetitions, progress)
    write_output(json_path, to_json(results.to_document()))
    print_allocator(results, console_beside(json_path))
