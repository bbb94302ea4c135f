# SPDX-License-Identifier: GPL-2.0-only
"""Mutants: small changes to hostzero's own source, each of which breaks one thing.

They live in `mutants/` beside the source, one file each, and are made to a copy of the package
that is gone afterwards. What tries them is elsewhere: `matrix` with the search, the tests'
`take_out` with the tests that each file names.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostzero.errors import UsageError

ROOT: Final = Path(__file__).resolve().parents[4]
"""The checkout; of an installed wheel, some directory without mutants."""

MUTANTS: Final = ROOT / "mutants"
PACKAGE: Final = Path("src") / "hostzero"

KINDS: Final = {
    "corrupts": "somebody reads bytes that are not what they should be, or is promised so",
    "loses": "an optimisation is lost",
    "misbehaves": "anything else that the patch is about",
    "masked": "a second guard stands behind the first, so that only a test of the part alone can see it",
}


@dataclass(frozen=True)
class Mutant:
    """One change that takes the behaviour of a patch out; the fields are those of its file.

    Attributes:
        file: the name of the file in `mutants/`, without `.toml`.
        name: what is changed, in a few words.
        patch: the number of the patch in the series.
        source: where the idea comes from.
        breaks: the invariant that does not hold any more.
        kind: one of `KINDS`.
        module: the changed file, below `src/hostzero/`.
        old: text that occurs exactly once in it.
        new: what takes its place.
        tests: the tests that must fail, as pytest names them; of one with several cases, one must.
        guard: of a masked one, the second guard, or why the state cannot be reached; else empty.
    """

    file: str
    name: str
    patch: int
    source: str
    breaks: str
    kind: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]
    guard: str = ""

    def apply(self, source: str) -> str:
        """Return the changed text of the module.

        Raises:
            ValueError: `old` does not occur in it exactly once.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file}: `old` occurs {source.count(self.old)} times in {self.module}")
        return source.replace(self.old, self.new)


def read(path: Path) -> Mutant:
    """Read one file of `mutants/`.

    Raises:
        ValueError: a field is missing, unknown or of a wrong type.
    """
    table = tomllib.loads(path.read_text())
    texts = ["name", "source", "breaks", "kind", "file", "old", "new"]
    texts += ["guard"] if table.get("kind") == "masked" else []
    known = {*texts, "patch", "tests"}
    if table.keys() != known:
        raise ValueError(f"{path.name}: missing or unknown: {sorted(table.keys() ^ known)}")
    wrong = [field for field in texts if not isinstance(table[field], str)]
    if not isinstance(table["patch"], int):
        wrong.append("patch")
    tests = table["tests"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        wrong.append("tests")
    if wrong:
        raise ValueError(f"{path.name}: wrong type: {wrong}")
    return Mutant(
        file=path.stem,
        name=table["name"],
        patch=table["patch"],
        source=table["source"],
        breaks=table["breaks"],
        kind=table["kind"],
        module=table["file"],
        old=table["old"],
        new=table["new"],
        tests=tuple(tests),
        guard=table.get("guard", ""),
    )


def read_all(directory: Path = MUTANTS) -> list[Mutant]:
    """Read every mutant, in the order of the patches.

    Raises:
        UsageError: there is no such directory, as where hostzero was installed without its source.
    """
    if not directory.is_dir():
        raise UsageError(f"mutants need a checkout of hostzero's source: there is no {directory}")
    mutants = [read(path) for path in sorted(directory.glob("*.toml"))]
    return sorted(mutants, key=lambda mutant: (mutant.patch, mutant.file))


def chosen(
    mutants: Sequence[Mutant],
    patches: Sequence[int] = (),
    names: Sequence[str] = (),
    kinds: Sequence[str] = (),
) -> list[Mutant]:
    """Return the mutants of some patches, or whose name or file holds some text; all for neither.

    Of these, those of some kinds; of every kind if none is named.
    """
    return [
        mutant
        for mutant in mutants
        if (not kinds or mutant.kind in kinds)
        and (
            not (patches or names)
            or mutant.patch in patches
            or any(name in mutant.file or name in mutant.name for name in names)
        )
    ]


@contextmanager
def copied(prefix: str, more: Sequence[Path] = (), root: Path = ROOT) -> Iterator[Path]:
    """Copy the package to a directory of its own, which is gone at the end, Ctrl-C included.

    Args:
        prefix: how the directory's name begins.
        more: what else is copied: files and directories below the root.
        root: the checkout.
    """
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        copy = Path(name)
        for part in (PACKAGE, *more):
            if (root / part).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(root / part, copy / part, ignore=ignore)
            else:
                shutil.copy(root / part, copy / part)
        # Checked by content: a change within a second of another must not run the other's bytecode.
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src"],
            cwd=copy,
            check=True,
        )
        yield copy
