# SPDX-License-Identifier: GPL-2.0-only
"""Take the behaviour of a patch out and watch its tests fail: `python -m tests.take_out`.

Each file of `mutants/` is one change to the source that breaks one thing. This program makes a
copy of the package and its tests, sees that the tests pass there, makes one change after the
other, and expects the tests that the file names to fail: by an assertion, or because hostzero
itself raised. An interpreter that crashes, a test that cannot be collected and an accidental
`TypeError` prove nothing and count as survived. The compiler is off.

Exit status: 0 if every test failed that should, 1 if one did not, 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from hostzero.check.teeth.mutants import PACKAGE, Mutant, chosen, copied, read_all
from hostzero.termination import terminable
from tests.verdicts import FAILED, PASSED, VARIABLE

COPIED: Final = (Path("tests"), Path("docs"), Path("pyproject.toml"))
"""What the tests need besides the package."""

TIMEOUT: Final = 300.0
"""Seconds for the tests of one mutant; far beyond what they need, so that a loop ends."""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: how each of its tests ended."""

    mutant: Mutant
    endings: dict[str, str]

    @property
    def killed(self) -> bool:
        """Whether every test failed as it should."""
        return all(ending == FAILED for ending in self.endings.values())


def run_tests(copy: Path, tests: Iterable[str], timeout: float | None) -> dict[str, list[str]]:
    """Run tests in the copy for at most so many seconds; return how each case of each of them ended.

    Raises:
        RuntimeError: what was tested was not the copy.
    """
    wanted = list(dict.fromkeys(tests))
    results = copy / "verdicts.jsonl"
    results.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"} | {
        "HYPOTHESIS_PROFILE": "verdicts",
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(copy / "src"), str(copy)]),
        VARIABLE: str(results),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.verdicts"]
    # A test that does not end has no verdict.
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*command, *wanted], cwd=copy, env=environment, capture_output=True, timeout=timeout, check=False
        )
    endings: dict[str, list[str]] = {test: [] for test in wanted}
    for line in results.read_text().splitlines() if results.is_file() else []:
        case = json.loads(line)
        if not Path(case["package"]).is_relative_to(copy):
            raise RuntimeError(f"{case['package']} was tested, which is not the copy in {copy}")
        for test in wanted:
            if case["test"] == test or case["test"].startswith(f"{test}["):
                endings[test].append(case["verdict"])
    return endings


def summary(endings: Sequence[str]) -> str:
    """Return how a test with several cases ended: FAILED if one case failed, PASSED if all passed."""
    if not endings:
        return "no verdict"
    if FAILED in endings:
        return FAILED
    return next((ending for ending in endings if ending != PASSED), PASSED)


def try_out(copy: Path, mutant: Mutant) -> Outcome:
    """Change the copy, run the mutant's tests, and change it back."""
    path = copy / PACKAGE / mutant.module
    source = path.read_text()
    path.write_text(mutant.apply(source))
    try:
        found = run_tests(copy, mutant.tests, TIMEOUT)
    finally:
        path.write_text(source)
    return Outcome(mutant, {test: summary(endings) for test, endings in found.items()})


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Return the outcomes as a table, survivors first."""
    table = Table("Patch", "Mutant", "Kind", "Test", "Outcome", box=None, pad_edge=False)
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.killed, outcome.mutant.patch)):
        mutant = outcome.mutant
        for number, (test, ending) in enumerate(outcome.endings.items()):
            first = (str(mutant.patch), mutant.name, mutant.kind) if number == 0 else ("", "", "")
            # Square brackets of a case would be taken for markup.
            where = test.removeprefix("tests/").replace("[", r"\[")
            table.add_row(*first, where, "killed" if ending == FAILED else f"SURVIVED ({ending})")
    return table


def take_out(mutants: Sequence[Mutant], progress: Console) -> list[Outcome] | None:
    """Try every mutant; None if a test fails before anything is taken out."""
    with copied("hostzero-take-out-", COPIED) as copy:
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        progress.print(f"{len(tests)} tests on the unchanged source ...", highlight=False, soft_wrap=True)
        bad = {test: summary(found) for test, found in run_tests(copy, tests, None).items()}
        bad = {test: ending for test, ending in bad.items() if ending != PASSED}
        for test, ending in bad.items():
            progress.print(f"  {ending}: {test}", highlight=False, markup=False, soft_wrap=True)
        if bad:
            progress.print("these do not pass on the unchanged source: nothing was taken out")
            return None
        outcomes = []
        for number, mutant in enumerate(mutants, 1):
            outcome = try_out(copy, mutant)
            word = "killed" if outcome.killed else "SURVIVED"
            progress.print(
                f"{number:3}/{len(mutants)}  {word:8}  {mutant.patch:2}  {mutant.name}", highlight=False
            )
            for test, ending in outcome.endings.items():
                if ending != FAILED:
                    progress.print(f"  {ending}: {test}", highlight=False, markup=False, soft_wrap=True)
            outcomes.append(outcome)
        return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.take_out", description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, nargs="+", default=[], metavar="N", help="only these patches")
    parser.add_argument("--name", action="append", default=[], help="only mutants whose name has this in it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    mutants = chosen(read_all(), options.patch, options.name)
    if not mutants:
        parser.error("no mutant is of that patch or has that name")
    try:
        with terminable():
            outcomes = take_out(mutants, Console(stderr=True))
    except KeyboardInterrupt:
        return 130
    if outcomes is None:
        return 1
    killed = sum(outcome.killed for outcome in outcomes)
    if options.json:
        rows = [
            asdict(outcome.mutant) | {"endings": outcome.endings, "killed": outcome.killed}
            for outcome in outcomes
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        width = None if sys.stdout.isatty() else 200
        console = Console(width=width)
        console.print(table_of(outcomes), highlight=False, soft_wrap=True)
        console.print(f"{killed} of {len(outcomes)} mutants killed", highlight=False, soft_wrap=True)
    return 0 if killed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
