# SPDX-License-Identifier: GPL-2.0-only
"""The teeth of the search: each mutant searched by a `hostzero check` of its own.

A mutant is made to a copy of the package, and a process of its own searches there, with the same
limits and the same seed as every other. The unchanged copy goes first and must survive: a search
that finds something in it would kill everything.

The compiler is off in these processes. Compiling the allocator takes some 100 s, and every edit
of it starts anew; uncompiled, a search does a few hundred to a few thousand operations a second
instead of hundreds of thousands, and starts in two seconds. Mutants that must be found and were not
are searched once more, with the compiler on and for longer.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from hostzero.check.run import SEARCHES
from hostzero.check.teeth.child import Children, Ending
from hostzero.check.teeth.mutants import PACKAGE, ROOT, Mutant, chosen, copied, read_all
from hostzero.check.teeth.outcome import VERDICTS, Outcome, outcome_of
from hostzero.check.teeth.reach import reach
from hostzero.errors import HostzeroError, UsageError
from hostzero.termination import terminable

R = TypeVar("R")

START_UP: Final = 60.0
"""Seconds that a process may take besides searching; some ten times what it needs."""

COMPILING: Final = 600.0
"""Seconds that a process may take to compile; several times what it needs."""

_TIMES_OVER: Final = 4
"""How often the searches' time may pass: shrinking comes on top, on a machine that is busy."""

_KIND_ORDER: Final = {"corrupts": 0, "loses": 1, "misbehaves": 2, "masked": 3}

ProgressOfMatrix = Callable[[int, int, Outcome], None]
"""Hears of each outcome: how many there are so far, how many there will be, and what it is."""


@dataclass(frozen=True)
class Edit:
    """One replacement of text that occurs exactly once in a module."""

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """Another form of the source, to which the mutants are made instead.

    Attributes:
        name: in one word.
        title: what it is.
        edits: what makes it from the source.
        translate: returns a mutant as it has to be in this form.
    """

    name: str
    title: str
    edits: tuple[Edit, ...] = ()
    translate: Callable[[Mutant], Mutant] = field(default=lambda mutant: mutant, compare=False)

    def apply(self, package: Path) -> None:
        """Change a copy of the package.

        Raises:
            HostzeroError: the source has changed, and the variant must follow.
        """
        for edit in self.edits:
            path = package / edit.module
            source = path.read_text()
            if source.count(edit.old) != 1:
                raise HostzeroError(f"the variant {self.name} does not fit {edit.module} in one place")
            path.write_text(source.replace(edit.old, edit.new))


AS_IT_IS: Final = Variant("as-it-is", "the source as it is")


@dataclass(frozen=True)
class MatrixOptions:
    """Which mutants are searched, and how.

    Attributes:
        seconds: the searches' time for each mutant.
        again: their time for one that must be found and was not, with the compiler on; 0: not again.
        seed: theirs.
        jobs: how many processes at a time; 0: one for each CPU.
        patches: only mutants of these patches; with `names`, or of those names.
        names: only mutants whose name or file holds one of these texts.
        kinds: only mutants of these kinds.
        variant: what the mutants are made to.
        root: the checkout.
    """

    seconds: float = 20.0
    again: float = 120.0
    seed: int = 1
    jobs: int = 0
    patches: Sequence[int] = ()
    names: Sequence[str] = ()
    kinds: Sequence[str] = ()
    variant: Variant = AS_IT_IS
    root: Path = ROOT

    def patience(self, *, compiled: bool) -> float:
        """Return the seconds after which a process is taken to hang."""
        if compiled:
            return START_UP + COMPILING + _TIMES_OVER * self.again
        return START_UP + _TIMES_OVER * self.seconds

    def mutants(self) -> list[Mutant]:
        """Return the mutants that are chosen.

        Raises:
            UsageError: none is, or this is no checkout.
        """
        everything = read_all(self.root / "mutants")
        mutants = chosen(everything, self.patches, self.names, self.kinds)
        if not mutants:
            raise UsageError(f"none of the {len(everything)} mutants is chosen by --patch, --name and --kind")
        return mutants


@dataclass(frozen=True)
class Matrix:
    """What became of every mutant.

    Attributes:
        options: how they were searched.
        unchanged: the outcome of the source without a mutant.
        outcomes: of the mutants; those that need looking at first.
    """

    options: MatrixOptions
    unchanged: Outcome
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether every mutant that must be killed was, for what it does."""
        return self.unchanged.good and all(outcome.good for outcome in self.outcomes)


def run_matrix(options: MatrixOptions, progress: ProgressOfMatrix) -> Matrix:
    """Search every chosen mutant.

    If the search finds anything in the unchanged source, or fails there, no mutant is tried.

    Raises:
        UsageError: no mutant is chosen, or this is no checkout.
    """
    mutants = options.mutants()
    with prepared(options) as (children, base):
        unchanged = _search(children, options, base, None)
        progress(0, len(mutants), unchanged)
        if not unchanged.good:
            return Matrix(options, unchanged, ())
        outcomes = []
        # Here and not in the threads, which would all do it at once; and Python 3.11 fails now and then
        # when two threads parse ("AST constructor recursion depth mismatch").
        for registered in SEARCHES.values():
            reach(base / PACKAGE, registered.module)
        tries = [partial(_search, children, options, base, mutant) for mutant in mutants]
        with closing(in_parallel(children, options, tries)) as results:
            for outcome in results:
                outcomes.append(outcome)
                progress(len(outcomes), len(mutants), outcome)
        missed = [outcome for outcome in outcomes if not outcome.good] if options.again else []
        others = Children()  # the first are stopped by now
        again = [partial(_search_again, others, options, base, outcome) for outcome in missed]
        with closing(in_parallel(others, options, again)) as pairs:
            for number, (before, outcome) in enumerate(pairs, 1):
                outcomes[outcomes.index(before)] = outcome
                progress(number, len(missed), outcome)
    return Matrix(options, unchanged, tuple(sorted(outcomes, key=_order)))


@contextmanager
def prepared(options: MatrixOptions) -> Iterator[tuple[Children, Path]]:
    """Make a copy of the variant; whatever ends this ends every process that was started, too."""
    children = Children()
    with terminable(), copied("hostzero-mutants-", root=options.root) as base:
        options.variant.apply(base / PACKAGE)
        try:
            yield children, base
        finally:
            children.stop()


def in_parallel(
    children: Children, options: MatrixOptions, tries: Sequence[Callable[[], R]]
) -> Generator[R, None, None]:
    """Yield the result of each try as it comes, so many at a time as there are to be jobs.

    Whoever leaves off before the end must close the generator: that stops what is under way.
    """
    with ThreadPoolExecutor(options.jobs or os.cpu_count() or 1) as pool:
        try:
            for future in as_completed([pool.submit(each) for each in tries]):
                yield future.result()
        finally:
            # The pool waits for its threads, and they for their processes.
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)


def _search(
    children: Children,
    options: MatrixOptions,
    base: Path,
    mutant: Mutant | None,
    *,
    compiled: bool = False,
) -> Outcome:
    seconds = options.again if compiled else options.seconds
    arguments = ["check", "--json", "-", "--seconds", f"{seconds:g}", "--seed", f"{options.seed}"]
    for name, registered in SEARCHES.items():
        # A search that cannot run the changed module would only take the others' time.
        if mutant is not None and mutant.module in reach(base / PACKAGE, registered.module):
            arguments += ["--search", name]
    command = ["hostzero", *arguments]
    ending = run_in_copy(children, options, base, mutant, command, compiled=compiled)
    return replace(outcome_of(mutant, ending), compiled=compiled)


# What was found the first time counts, if the second finds nothing or does not end.
def _search_again(
    children: Children, options: MatrixOptions, base: Path, before: Outcome
) -> tuple[Outcome, Outcome]:
    after = _search(children, options, base, before.mutant, compiled=True)
    return before, after if after.good or before.verdict != "killed" else before


def run_in_copy(
    children: Children,
    options: MatrixOptions,
    base: Path,
    mutant: Mutant | None,
    module: Sequence[str],
    *,
    compiled: bool = False,
) -> Ending:
    """Run a module, given with its arguments, in a copy with one mutant, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutant-", dir=base) as name:
        directory = Path(name)
        shutil.copytree(base / "src", directory / "src")
        if mutant is not None:
            path = directory / PACKAGE / mutant.module
            path.write_text(options.variant.translate(mutant).apply(path.read_text()))
        # -P: what is searched is the copy, not what lies where the program was started.
        command = [sys.executable, "-P", "-m", *module]
        environment = os.environ | {
            "NUMBA_DISABLE_JIT": "0" if compiled else "1",
            "NUMBA_CACHE_DIR": str(directory / "compiled"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(directory / "src"),
        }
        return children.run(command, directory, environment, options.patience(compiled=compiled))


def _order(outcome: Outcome) -> tuple[object, ...]:
    mutant = outcome.mutant
    assert mutant is not None
    # Of the killed ones those first that were found for something else than they do.
    return (
        VERDICTS.index(outcome.verdict),
        not outcome.by_another_kind,
        _KIND_ORDER[mutant.kind],
        mutant.patch,
        mutant.file,
    )
