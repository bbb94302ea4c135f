# SPDX-License-Identifier: GPL-2.0-only
"""The search `machine`: whatever can happen to a whole machine, in any order, guided by the lifecycle table.

Hypothesis draws the setup and the operations; which rows of the lifecycle table an example has
exercised is what it is told to have more of. What it draws is written down as steps of integers, and
from there on it is not needed: a failing sequence is made short and run again without it.
"""

from __future__ import annotations

import itertools
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hostzero.check.machine_ops import Operation, guard, load_operations, perform
from hostzero.check.machine_repertoire import repertoire, steps_of
from hostzero.check.recording import Recording
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.shrink import shrink_arguments, shrink_steps
from hostzero.check.violation import Violated, Violation
from hostzero.check.world import World
from hostzero.check.world_setup import CHOICES, plain_setup
from hostzero.jit import COMPILER_ON

if TYPE_CHECKING:
    from collections.abc import Iterator

Steps = list[list[Any]]

SHRINK_SECONDS: Final = 20.0
MOVES: Final = 40 if COMPILER_ON else 8
"""How many moves an example makes: single operations, and episodes of some."""
MOST_MOVES: Final = 1 << 24
"""Hypothesis draws evenly up to here."""
SMALL: Final = (8, 4, 16, 8)
"""Sizes, in MiB, of guests that run uncompiled."""
SPECIALS: Final[tuple[dict[str, Any], ...]] = (
    {"cma": True, "two_nodes": False, "mib": 8},
    {
        "init_on_free": True,
        "dcache_aliasing": True,
        "page_poisoning": False,
        "anon_orders": (2, 4, 8),
        "swap_pages": 64,
    },
    {"debug_vm": False, "init_on_alloc": False, "init_on_free": False, "page_poisoning": False},
    {"gigantic": True},
    {"swap_pages": 64, "thp": "never"},
    {"swap_pages": 1024, "anon_orders": (2, 4, 8)},
    {"page_poisoning": True},
    {"features": 1, "anon_orders": (2, 4, 8), "confidential": False, "mib": 8},
    {"two_nodes": True, "nr_cpus": 2},
    {"placement": "zero-aware", "page_poisoning": False},
    {"thp": "never", "anon_orders": (), "debug_vm": True},
    {"init_on_alloc": True, "page_poisoning": False},
    {"features": 0, "backing": "memfd", "cma": True, "two_nodes": False},
    {"features": 3, "page_poisoning": False, "confidential": False, "mib": 8},
    {"gigantic": True, "mib": 16, "init_on_alloc": False, "init_on_free": False},
    {"backing": "part of a file", "mib": 4},
    {"page_poisoning": True, "mib": 4},
    {"gigantic": True, "cma": True, "dcache_aliasing": True, "two_nodes": False, "page_poisoning": False},
    {"init_on_free": True, "page_poisoning": False, "mib": 8},
)
"""What guests that run uncompiled have in turn; everything else of them is drawn."""
EXAMPLES: Final = 200 if COMPILER_ON else 30
"""How many guests a round of Hypothesis boots; the next round draws from another seed."""

KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"swap_pages": 64, "anon_orders": (2, 4, 8), "cma": True},
    {"mib": 32, "gigantic": True, "two_nodes": True, "nr_cpus": 2, "thp": "madvise", "features": 1},
    {"dcache_aliasing": True, "page_poisoning": True, "backing": "memfd"},
    {"init_on_free": True, "placement": "zero-aware", "features": 6},
)
"""Guests that between them use what can be compiled."""

END: Final = "everything is given back"


class _Stop(BaseException):
    """The time is up, or something was found."""


class _Run:
    """One run of the search: how far it is, and what it found."""

    def __init__(self, limits: Limits, seed: int, progress: Progress) -> None:
        self.seed = seed
        self.started = self.told = time.perf_counter()
        self.end = self.started + limits.seconds
        self.progress = progress
        self.findings = Findings("machine")
        self.setup: dict[str, Any] = {}
        self.steps: Steps = []
        self.violation: Violation | None = None
        self.machines = 0
        self.stopped = False

    def look_at_the_clock(self) -> None:
        """Say how far it is, and stop when the time is up."""
        now = time.perf_counter()
        if now - self.told > 0.2:
            self.told = now
            self.progress(self.findings.operations, None, self.findings.rows, f"{self.machines} machines")
        if now >= self.end:
            self.stop()

    def stop(self) -> NoReturn:
        """Leave Hypothesis."""
        self.stopped = True
        raise _Stop


def run_steps(
    setup: dict[str, Any], steps: Sequence[Sequence[Any]], *, close: bool
) -> tuple[Violation | None, int]:
    """Boot a machine and do some steps; return what is found, if anything, and after how many.

    Raises:
        UsageError: the setup or a step is none of this search's.
    """
    load_operations()
    done = 0
    try:
        with _no_warnings(), World(setup) as world:
            for step in steps:
                done += 1
                perform(world, step)
            if close:
                guard(world, world.close, END)
    except Violated as violated:
        return violated.violation, done
    return None, done


class MachineSearch:
    """Hypothesis over the whole machine."""

    name = "machine"
    title = "whatever can happen to a whole machine, drawn by Hypothesis"

    def prepare(self) -> None:
        """Compile what is needed, by doing a little of everything on each kind of guest."""
        table = load_operations()
        if not COMPILER_ON:
            return
        source = random.Random(0)
        for other in KINDS:
            steps: Steps = [["flush", 0]]
            for _ in range(2):
                drawn = source.sample(sorted(table.values(), key=lambda op: op.name), len(table))
                steps += [[op.name, *(source.randint(0, most) for most in op.most)] for op in drawn]
            run_steps(plain_setup(**other), steps, close=True)

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Search until something is found or the time is up."""
        run = _Run(limits, seed, progress)
        with _no_files(), _no_constants(), _no_warnings():
            for number in itertools.count():
                _round(run, (seed << 16) + number)
                if run.stopped:
                    break
        findings = run.findings
        findings.seconds = time.perf_counter() - run.started
        rate = findings.operations / max(findings.seconds, 1e-9)
        findings.notes.append(f"{run.machines} machines, {rate:.0f} operations a second, each checked")
        if run.violation is not None:
            findings.found_after = findings.operations
            findings.recording, note = shrink(run.setup, run.steps, run.violation)
            findings.notes.append(note)
        progress(findings.operations, None, findings.rows, "")
        return findings

    def replay(self, recording: Recording) -> Violation | None:
        """Run a recording again; return what is found, or None.

        Raises:
            UsageError: the recording's setup or steps are none of this search's.
        """
        steps = [step for step in recording.steps if step != [END]]
        return run_steps(recording.setup, steps, close=len(steps) < len(recording.steps))[0]


def shrink(setup: dict[str, Any], steps: Steps, violation: Violation) -> tuple[Recording, str]:
    """Return the shortest recording found that fails in the same way, and what to say of it."""
    end = time.perf_counter() + SHRINK_SECONDS
    best: dict[str, Violation] = {"": violation}
    cut = False

    def fails_with(other: dict[str, Any], candidate: Sequence[list[Any]]) -> bool:
        nonlocal cut
        if time.perf_counter() > end:
            cut = True
            return False
        closes = [END] in candidate
        found, done = run_steps(other, [step for step in candidate if step != [END]], close=closes)
        same = found is not None and (found.kind, found.what) == (violation.kind, violation.what)
        same &= done == len(candidate) - closes
        if same and found is not None:
            best[""] = found
        return same

    before = len(steps)
    found, done = run_steps(setup, [step for step in steps if step != [END]], close=[END] in steps)
    if found is not None:
        # Looked at more closely, it may show earlier.
        violation = best[""] = found
        steps = steps[:done]
    short: Steps = list(shrink_steps(steps, lambda candidate: fails_with(setup, candidate)))
    for name, value in plain_setup().items():
        simpler = setup | {name: value}
        if simpler != setup and fails_with(simpler, short):
            setup = simpler
    short = shrink_arguments(short, lambda candidate: fails_with(setup, candidate))
    note = f"shrunk from {before} steps to {len(short)}" + (
        ", cut short by the time it may take" if cut else ""
    )
    # A file knows lists, no tuples.
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in setup.items()}
    return Recording("machine", plain, tuple(short), best[""]), note


@contextmanager
def _no_warnings() -> Iterator[None]:
    # Hosts that fail are what is searched with: what the product says of them is no news.
    log = logging.getLogger("hostzero")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _no_files() -> Iterator[None]:
    # Hypothesis keeps what it learns of the sources in a directory; this one is gone at the end.
    from hypothesis import configuration

    with tempfile.TemporaryDirectory(prefix="hostzero-check-") as name:
        configuration.set_hypothesis_home_dir(Path(name))
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(None)


@contextmanager
def _no_constants() -> Iterator[None]:
    # Hypothesis reads all of hostzero's source for numbers that it might draw. That takes a second,
    # and numbers that stand for moves have nothing to do with them.
    from hypothesis.internal.conjecture import providers

    original = getattr(providers, "_get_local_constants", None)
    if original is None:
        yield
        return
    constants: Any = providers.__dict__["Constants"]()
    providers._get_local_constants = lambda: constants
    try:
        yield
    finally:
        providers._get_local_constants = original


def _round(run: _Run, seed: int) -> None:
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings, target
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky

    table = load_operations()
    choices = {name: st.sampled_from(values) for name, values in CHOICES.items()}
    if not COMPILER_ON:
        # A guest's size is what everything costs then; a large one is for gigantic pages.
        choices["mib"] = st.sampled_from(SMALL)

    def example(setup: dict[str, Any], theme: int, moves: list[int]) -> None:
        reached = _example(run, table, dict(setup), theme, moves)
        target(float(reached), label="rows of the lifecycle table")

    options = settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        derandomize=False,
        phases=(Phase.generate, Phase.target),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    # One number a move: a draw for each argument would cost as much as the step itself.
    move = st.integers(0, MOST_MOVES - 1)
    drawn = given(
        setup=st.fixed_dictionaries(choices), theme=move, moves=st.lists(move, min_size=MOVES, max_size=MOVES)
    )
    try:
        seeded(seed)(options(drawn(example)))()
    except _Stop:
        pass
    except Flaky:
        # What Hypothesis says of an example that was stopped where another one went on.
        if not run.stopped:
            raise


def _example(
    run: _Run, table: dict[str, Operation], setup: dict[str, Any], theme: int, moves: Sequence[int]
) -> int:
    """Boot a machine, make the moves, give everything back; return how many rows were exercised."""
    run.look_at_the_clock()
    if not COMPILER_ON:
        # There is time for few machines, and what Hypothesis makes of the last one is much the same
        # again: so each has something special in turn, and its moves are its own.
        setup |= {"gigantic": False, "cma": False, "swap_pages": 0} | SPECIALS[
            (run.machines + run.seed) % len(SPECIALS)
        ]
        theme += run.machines
    salt = 0 if COMPILER_ON else run.machines
    turn = None if COMPILER_ON else run.machines + run.seed
    if setup["gigantic"]:
        setup["mib"] = max(setup["mib"], 16 if not setup["cma"] else 32)
    run.setup, run.steps, run.machines = setup, [], run.machines + 1
    try:
        # A page that stays where it is is not read after each step: what is found is made short thoroughly.
        world = World(setup, thorough=False)
    except Violated as violated:
        run.violation = violated.violation
        run.stop()
    does = repertoire(setup, table, theme)
    try:
        for place, move in enumerate(moves):
            # The same number is another move elsewhere: Hypothesis likes to draw a number again.
            for step in steps_of(
                world, table, does, (salt << 32) + move * MOVES + place, first=None if place else turn
            ):
                if not (len(step) == 1 and run.steps[-1:] == [step]):
                    # Else: without arguments, and nothing in between: the same again.
                    _do(run, world, step)
        run.steps.append([END])
        _try(run, lambda: guard(world, world.close, END))
        return len(world.rows)
    finally:
        run.findings.rows += world.rows
        world.drop()


def _do(run: _Run, world: World, step: list[Any]) -> None:
    run.steps.append(step)
    run.findings.operations += 1
    _try(run, lambda: perform(world, step))
    run.look_at_the_clock()


def _try(run: _Run, call: Any) -> None:
    try:
        call()
    except Violated as violated:
        run.violation = violated.violation
        run.stop()


def note_progress(operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
    """Say nothing: for callers that do not want to hear."""
