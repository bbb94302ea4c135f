# SPDX-License-Identifier: GPL-2.0-only
"""Is it acceptable that `PG_zeroed` is `PG_private`, or should it be a bit of its own?

The cover letter's first open question, answered by trying: every mutant about the life of the
mark is made to the source as it is and to a variant in which the mark has a bit that nobody else
uses, and `alias_life` is lived in both. What only one of them shows is what the choice is about.

`python -m hostzero.check.teeth.alias --seed 1 --steps 500` prints the table (add `--name TEXT` for some).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from hostzero.check.teeth.alias_life import EVENTS, KERNELS
from hostzero.check.teeth.child import Children, Ending
from hostzero.check.teeth.matrix import (
    AS_IT_IS,
    Edit,
    MatrixOptions,
    Variant,
    in_parallel,
    prepared,
    run_in_copy,
)
from hostzero.check.teeth.mutants import PACKAGE, Mutant
from hostzero.errors import HostzeroError

_PRIVATE: Final = "1 << 14"
_OWN: Final = "1 << 23"


def _translate(mutant: Mutant) -> Mutant:
    """Return a mutant that spares the bit of the mark by its number, for the mark's own bit."""
    return replace(mutant, new=mutant.new.replace(_PRIVATE, _OWN))


OWN_BIT: Final = Variant(
    "own-bit",
    "PG_zeroed is a bit of its own",
    (
        # The mask of what prepare clears and an allocation checks has it; what is bad at a free
        # does not: it is no owner's flag, so nobody can have forgotten to take it off.
        Edit("mm/page_flags.py", "PG_zeroed: Final = PG_private", f"PG_zeroed: Final = {_OWN}"),
        Edit("mm/migrate_folio.py", "    PG_private,\n", "    PG_private,\n    PG_zeroed,\n"),
        Edit(
            "mm/migrate_folio.py", "(m[dst].flags_f & PG_private) != 0", "(m[dst].flags_f & PG_zeroed) != 0"
        ),
    ),
    _translate,
)

VARIANTS: Final = (AS_IT_IS, OWN_BIT)

_ABOUT_THE_MARK: Final = re.compile(r"zeroed|CHECK_AT_|flags_f|FPI_", re.IGNORECASE)
_KNOWS_THE_MARK: Final = re.compile(r"PageZeroed\(|\bPG_zeroed")

Lives = dict[str, dict[str, int]]
"""By kernel and event, the step at which it happened first."""


@dataclass(frozen=True)
class Comparison:
    """What one mutant leads to with the alias and with a bit of its own.

    Attributes:
        mutant: which; None for the source without one.
        lives: by the variant's name, what was noted; None if the process ended without a word.
    """

    mutant: Mutant | None
    lives: dict[str, Lives | None]

    def kernels_with(self, variant: str, event: str) -> frozenset[str]:
        """Return the kernels in which an event was noted."""
        lives = self.lives[variant] or {}
        return frozenset(kernel for kernel, first in lives.items() if event in first)

    @property
    def verdict(self) -> str:
        """What the choice of the bit means for this mutant, in a few words."""
        if any(lives is None for lives in self.lives.values()):
            return "no result"
        wrong = [bool(self.kernels_with(variant.name, "wrong bytes")) for variant in VARIANTS]
        seen = [any(self.kernels_with(variant.name, event) for event in EVENTS) for variant in VARIANTS]
        if all(wrong):
            return "corrupts with either"
        if any(wrong):
            return f"corrupts only with {'the alias' if wrong[0] else 'a bit of its own'}"
        if all(seen):
            return "seen with either"
        if any(seen):
            return f"seen only with {'the alias' if seen[0] else 'a bit of its own'}"
        return "not seen"

    @property
    def stopped_by_checks(self) -> bool:
        """Whether page checks take a page out of use with the alias, and not with a bit of its own."""
        alias, own = (self.kernels_with(variant.name, "bad page") for variant in VARIANTS)
        return bool(alias - own)


def about_the_mark(options: MatrixOptions) -> list[Mutant]:
    """Return those that may change what becomes of `PG_zeroed`, and do more than lose a hint."""
    package = options.root / PACKAGE
    return [
        mutant
        for mutant in options.mutants()
        if mutant.kind != "loses"
        and _ABOUT_THE_MARK.search(mutant.old + mutant.new)
        and mutant.module.startswith("mm/")
        and "hugetlb" not in mutant.module  # their claim is HPG_zeroed
        and _KNOWS_THE_MARK.search((package / mutant.module).read_text())
    ]


def compare(
    options: MatrixOptions, steps: int, progress: Callable[[int, int, str], None]
) -> list[Comparison]:
    """Live with every chosen mutant about the mark in both variants; the unchanged source comes first.

    Raises:
        HostzeroError: something is noted of the unchanged source.
    """
    mutants = about_the_mark(options)
    lives: dict[str | None, dict[str, Lives | None]] = {None: {}} | {m.file: {} for m in mutants}
    total = len(VARIANTS) * len(mutants)
    number = 0
    for variant in VARIANTS:
        here = replace(options, variant=variant)
        with prepared(here) as (children, base):
            live = partial(_live, children, here, base, steps)
            _, lives[None][variant.name] = live(None)
            if lives[None][variant.name] != {kernel: {} for kernel in KERNELS}:
                raise HostzeroError(f"{variant.title}: the unchanged source: {lives[None][variant.name]}")
            tries = [partial(live, mutant) for mutant in mutants]
            with closing(in_parallel(children, here, tries)) as results:
                for name, found in results:
                    lives[name][variant.name] = found
                    number += 1
                    progress(number, total, f"{variant.name}: {name}: {found}")
    return [Comparison(mutant, lives[mutant.file if mutant else None]) for mutant in (None, *mutants)]


def _live(
    children: Children, options: MatrixOptions, base: Path, steps: int, mutant: Mutant | None
) -> tuple[str | None, Lives | None]:
    module = ["hostzero.check.teeth.alias_life", str(options.seed), str(steps)]
    name = mutant.file if mutant else None
    return name, lives_of(run_in_copy(children, options, base, mutant, module))


def lives_of(ending: Ending) -> Lives | None:
    """Return what a process has noted; None if it ended in another way than by itself."""
    if ending.status != 0:
        return None
    try:
        document = json.loads(ending.out)
    except ValueError:
        return None
    return document if isinstance(document, dict) and document.keys() == KERNELS.keys() else None


def to_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return everything that was noted as JSON values."""
    return [
        asdict(comparison)
        | {"verdict": comparison.verdict, "stopped_by_checks": comparison.stopped_by_checks}
        for comparison in comparisons
    ]


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return the comparison as a table; of each event the kernels in which it was noted."""
    lines = ["| mutant | what it means | with the alias | with a bit of its own |", "|---|---|---|---|"]
    for comparison in sorted(
        comparisons, key=lambda one: (one.verdict, one.mutant.file if one.mutant else "")
    ):
        if comparison.mutant is None:
            continue
        cells = [_noted(comparison, variant.name) for variant in VARIANTS]
        lines.append(f"| {comparison.mutant.name} | {comparison.verdict} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _noted(comparison: Comparison, variant: str) -> str:
    said = []
    for event in EVENTS:
        kernels = comparison.kernels_with(variant, event)
        if kernels:
            everywhere = kernels == KERNELS.keys()
            said.append(event if everywhere else f"{event} ({', '.join(k for k in KERNELS if k in kernels)})")
    return "; ".join(said) or "–"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print the table as Markdown; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m hostzero.check.teeth.alias")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="steps of each life")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time; 0: one for each CPU")
    parser.add_argument("--name", action="append", default=[], help="only mutants with this in their name")
    parser.add_argument("--json", type=Path, help="write everything that was noted")
    given = parser.parse_args(arguments)
    options = MatrixOptions(seconds=given.steps / 10, seed=given.seed, jobs=given.jobs, names=given.name)

    def progress(number: int, total: int, what: str) -> None:
        sys.stderr.write(f"{number:3}/{total}  {what}\n")

    comparisons = compare(options, given.steps, progress)
    if given.json is not None:
        given.json.write_text(json.dumps(to_json(comparisons), indent=2) + "\n")
    sys.stdout.write(to_markdown(comparisons))


if __name__ == "__main__":
    main()
