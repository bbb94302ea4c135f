# SPDX-License-Identifier: GPL-2.0-only
"""What became of a mutant, the order in which one reads of it, and when the matrix is good.

The whole way is gone once, with a package of three lines in the place of hostzero.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hostzero.check.teeth import matrix as matrix_module
from hostzero.check.teeth.child import Children, Ending, Stopped
from hostzero.check.teeth.matrix import Edit, Matrix, MatrixOptions, Variant, run_matrix
from hostzero.check.teeth.matrix_show import (
    command_of,
    print_matrix,
    progress_line,
    summary,
    to_json,
    to_markdown,
)
from hostzero.check.teeth.mutants import Mutant
from hostzero.check.teeth.outcome import Finding, Outcome, outcome_of
from hostzero.errors import HostzeroError, UsageError


def a_mutant(kind: str = "corrupts", file: str = "25-x", new: str = "1") -> Mutant:
    patch = int(file[:2])
    return Mutant(file, f"name of {file}", patch, "here", "a rule", kind, "what.py", "0", new, ("a::b",))


def report(*kinds: str | None, **changes: Any) -> str:
    searches = []
    for number, kind in enumerate(kinds):
        violation = {"kind": kind, "what": "a byte | is wrong"}
        recording = None if kind is None else {"steps": [["a"], ["b"]], "violation": violation}
        searches.append(
            {
                "name": f"search-{number}",
                "seconds": 1.5,
                "operations": 100,
                "states": None,
                "found_after": None if kind is None else 7,
                "notes": [],
                "rows": {},
                "recording": recording,
            }
        )
    whole = {
        "format": "hostzero-check-report",
        "version": 1,
        "seed": 1,
        "seconds": 3.0,
        "ok": not any(kinds),
        "searches": searches,
    }
    return json.dumps(whole | changes)


# ---- one outcome


def test_who_finds_something_kills() -> None:
    outcome = outcome_of(a_mutant(), Ending(1, report(None, "rot", "lost"), "", 2.0))
    assert outcome.verdict == "killed"
    assert outcome.findings == (
        Finding("search-1", "rot", "a byte | is wrong", 7, 1.5, 2),
        Finding("search-2", "lost", "a byte | is wrong", 7, 1.5, 2),
    )
    assert (outcome.operations, outcome.searched, outcome.seconds) == (300, 4.5, 2.0)


def test_who_finds_nothing_lets_it_survive() -> None:
    assert outcome_of(a_mutant(), Ending(0, report(None, None), "", 2.0)).verdict == "survived"


@pytest.mark.parametrize(
    ("status", "out"),
    [
        (1, ""),
        (-11, ""),
        (1, "a traceback"),
        (2, report(None)),
        (0, report("corruption")),
        (1, report(None)),
        (1, report("corruption", ok=True)),
        (1, report("corruption", format="another")),
        (1, report("corruption", version=2)),
        (1, json.dumps({"format": "hostzero-check-report", "version": 1, "ok": False})),
        (1, "[]"),
    ],
)
def test_a_crash_is_no_kill(status: int, out: str) -> None:
    outcome = outcome_of(a_mutant(), Ending(status, out, "Traceback\nTypeError: no\n", 1.0))
    assert outcome.verdict == "crashed"
    assert outcome.findings == ()
    assert outcome.detail == f"exit status {status}: TypeError: no"
    assert not outcome.good


def test_silence_is_no_kill() -> None:
    outcome = outcome_of(a_mutant(), Ending(None, report("corruption"), "", 1.0))
    assert outcome.verdict == "timed out"
    assert not outcome.good


@pytest.mark.parametrize(
    ("kind", "found", "good", "by_another_kind"),
    [
        ("corrupts", "corruption", True, False),
        ("corrupts", "rot", True, False),
        ("corrupts", None, False, False),
        ("loses", "lost", True, False),
        ("loses", "rot", False, True),
        ("loses", None, False, False),
        ("misbehaves", "rot", True, False),
        ("misbehaves", None, True, False),
    ],
)
def test_what_a_mutant_does_says_what_must_be_found(
    kind: str, found: str | None, good: bool, by_another_kind: bool
) -> None:
    outcome = outcome_of(a_mutant(kind), Ending(int(found is not None), report(found), "", 1.0))
    assert (outcome.good, outcome.by_another_kind) == (good, by_another_kind)


def test_in_the_unchanged_source_nothing_may_be_found() -> None:
    assert outcome_of(None, Ending(0, report(None), "", 1.0)).good
    assert not outcome_of(None, Ending(1, report("lost"), "", 1.0)).good


# ---- the whole of them

FINDS = {"corrupts": "corruption", "loses": "lost", "misbehaves": "rot"}


def an_outcome(verdict: Any, kind: str, file: str, found: str | None = None) -> Outcome:
    finding = Finding("machine", found or FINDS[kind], "a [byte] | is wrong", 12, 0.5, 3)
    findings = (finding,) if verdict == "killed" else ()
    return Outcome(a_mutant(kind, file), verdict, findings, 12, 0.5, 2.0)


UNCHANGED = Outcome(None, "survived", (), 5000, 20.0, 22.0)
KILLED = an_outcome("killed", "corrupts", "25-a")


def a_matrix(*outcomes: Outcome, unchanged: Outcome = UNCHANGED) -> Matrix:
    return Matrix(MatrixOptions(), unchanged, tuple(sorted(outcomes, key=matrix_module._order)))


def test_what_needs_looking_at_is_on_top() -> None:
    matrix = a_matrix(
        KILLED,
        an_outcome("killed", "loses", "03-b"),
        an_outcome("killed", "loses", "03-c", "rot"),
        an_outcome("crashed", "corrupts", "05-d"),
        an_outcome("timed out", "misbehaves", "06-e"),
        an_outcome("survived", "misbehaves", "02-f"),
        an_outcome("survived", "corrupts", "30-h"),
        an_outcome("survived", "corrupts", "30-g"),
    )
    files = [outcome.mutant.file for outcome in matrix.outcomes if outcome.mutant]
    assert files == ["30-g", "30-h", "02-f", "06-e", "05-d", "03-c", "25-a", "03-b"]


@pytest.mark.parametrize(
    ("outcome", "ok"),
    [
        (KILLED, True),
        (an_outcome("survived", "misbehaves", "02-x"), True),
        (an_outcome("crashed", "misbehaves", "02-x"), True),
        (an_outcome("killed", "loses", "02-x"), True),
        (an_outcome("killed", "loses", "02-x", "rot"), False),
        (an_outcome("survived", "loses", "02-x"), False),
        (an_outcome("survived", "corrupts", "02-x"), False),
        (an_outcome("crashed", "corrupts", "02-x"), False),
        (an_outcome("timed out", "corrupts", "02-x"), False),
    ],
)
def test_a_matrix_is_good_if_every_mutant_was_found_for_what_it_does(outcome: Outcome, ok: bool) -> None:
    assert a_matrix(KILLED, outcome).ok is ok


def test_nothing_counts_if_the_unchanged_source_does_not_survive() -> None:
    matrix = a_matrix(unchanged=Outcome(None, "killed", KILLED.findings))
    assert not matrix.ok
    assert summary(matrix) == ["the unchanged source: machine: corruption: no mutant was tried"]


def test_the_counts_say_what_was_killed_for_another_reason() -> None:
    matrix = a_matrix(
        KILLED,
        an_outcome("crashed", "corrupts", "05-d"),
        an_outcome("killed", "loses", "03-b"),
        an_outcome("killed", "loses", "03-c", "rot"),
        an_outcome("survived", "misbehaves", "02-f"),
    )
    assert summary(matrix) == [
        "corrupts: 1 of 2 killed, 1 crashed",
        "loses: 2 of 2 killed, 1 because an optimisation was lost",
        "misbehaves: 0 of 1 killed, 1 survived",
    ]


def test_the_table_shows_every_mutant_and_the_unchanged_source() -> None:
    out = io.StringIO()
    matrix = a_matrix(KILLED, an_outcome("survived", "corrupts", "30-g"))
    print_matrix(matrix, Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["Patch", "Mutant", "Kind", "Outcome", "Steps", "Seconds", "Length", "Found"]
    assert "SURVIVED" in lines[1]
    assert "name of 30-g" in lines[1]
    assert "a [byte] | is wrong" in lines[2]
    assert "unchanged source" in lines[3]
    assert progress_line(1, 2, matrix.outcomes[0]).endswith("name of 30-g: SURVIVED")


def test_a_page_of_the_documentation_says_how_it_was_made() -> None:
    matrix = a_matrix(KILLED, an_outcome("survived", "corrupts", "30-g"))
    text = to_markdown(matrix, "2026-11-23")
    assert "Made 2026-11-23" in text
    assert f"$ {command_of(matrix.options)} --markdown FILE" in text
    assert "5000 steps in 20 s" in text
    assert "once more with the compiler on, for 120 s." in text
    once = to_markdown(replace(matrix, options=MatrixOptions(again=0)), "2026-11-23")
    assert "once more" not in once
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| 30 | name of 30-g | corrupts | SURVIVED | 12 | 0.5 | – |  |",
        "| 25 | name of 25-a | corrupts | machine: corruption | 12 | 0.5 | 3 | a [byte] \\| is wrong |",
    ]


def test_json_has_everything() -> None:
    document = json.loads(json.dumps(to_json(a_matrix(KILLED))))
    assert document["ok"] is True
    assert document["mutants"][0]["mutant"]["file"] == "25-a"
    assert document["mutants"][0]["findings"][0]["length"] == 3
    assert document["unchanged"]["mutant"] is None


def test_the_command_names_what_was_chosen() -> None:
    options = MatrixOptions(seconds=5, seed=3, patches=(25, 26), names=("a b",), kinds=("loses",))
    assert command_of(options) == (
        "hostzero check --mutants --patch 25 --patch 26 --name 'a b' --kind loses "
        "--seconds 5 --again 120 --seed 3"
    )


# ---- the whole way

MAIN = """
import sys
from hostzero.what import BEHAVIOUR
assert sys.argv[1:] == ["check", "--json", "-", "--seconds", "0.5", "--seed", "7"], sys.argv
kind = BEHAVIOUR.removeprefix("finds ")
if BEHAVIOUR == "crashes":
    raise TypeError("an accident")
print({good!r} if BEHAVIOUR == "works" else {bad!r}.replace("KIND", kind))
sys.exit(BEHAVIOUR != "works")
"""

MUTANT = """
name = "{file}"
patch = {patch}
source = "a source"
breaks = "a rule"
kind = "{kind}"
file = "what.py"
old = '{old}'
new = '{new}'
tests = ["tests/test_units.py::test_x"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / "src" / "hostzero"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(MAIN.format(good=report(None), bad=report("KIND")))
    (package / "what.py").write_text('BEHAVIOUR = "works"\n')
    (tmp_path / "mutants").mkdir()
    for file, kind, new in (
        ("03-quiet", "loses", '"works"  # still'),
        ("04-other", "loses", '"finds rot"'),
        ("05-crash", "corrupts", '"crashes"'),
        ("06-wrong", "corrupts", '"finds corruption"'),
    ):
        text = MUTANT.format(file=file, patch=int(file[:2]), kind=kind, old='"works"', new=new)
        (tmp_path / "mutants" / f"{file}.toml").write_text(text)
    return tmp_path


def test_every_mutant_is_searched_in_a_copy_of_its_own(root: Path) -> None:
    said: list[str] = []
    options = MatrixOptions(seconds=0.5, again=0, seed=7, jobs=2, root=root)
    matrix = run_matrix(options, lambda number, total, outcome: said.append(f"{number}/{total}"))
    found = [(outcome.mutant.file, outcome.verdict) for outcome in matrix.outcomes if outcome.mutant]
    assert found == [
        ("03-quiet", "survived"),
        ("05-crash", "crashed"),
        ("04-other", "killed"),
        ("06-wrong", "killed"),
    ]
    assert matrix.outcomes[1].detail == "exit status 1: TypeError: an accident"
    assert said == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert not matrix.ok
    assert (root / "src" / "hostzero" / "what.py").read_text() == 'BEHAVIOUR = "works"\n'


def test_what_was_missed_is_searched_again_with_the_compiler_on(root: Path) -> None:
    main = root / "src" / "hostzero" / "__main__.py"
    again = """
import os
assert os.environ["PYTHONPATH"].startswith(os.path.dirname(os.environ["NUMBA_CACHE_DIR"]))
if os.environ["NUMBA_DISABLE_JIT"] == "0":
    import sys
    assert sys.argv[1:] == ["check", "--json", "-", "--seconds", "2", "--seed", "7"], sys.argv
    from hostzero.what import BEHAVIOUR
    print({found!r} if BEHAVIOUR == "works" else "no report")
    sys.exit(1)
"""
    main.write_text(again.format(found=report("lost")) + main.read_text())
    said: list[str] = []
    options = MatrixOptions(seconds=0.5, again=2, seed=7, jobs=1, root=root)
    matrix = run_matrix(options, lambda number, total, outcome: said.append(f"{number}/{total}"))
    found = {outcome.mutant.file: outcome for outcome in matrix.outcomes if outcome.mutant}
    assert (found["03-quiet"].verdict, found["03-quiet"].compiled) == ("killed", True)
    # What a first search has found stays found; a second one that breaks is no better than one that broke.
    assert (found["04-other"].verdict, found["04-other"].compiled) == ("killed", False)
    assert (found["05-crash"].verdict, found["05-crash"].compiled) == ("crashed", True)
    assert not found["06-wrong"].compiled
    assert said == ["0/4", "1/4", "2/4", "3/4", "4/4", "1/3", "2/3", "3/3"]
    assert "loses: 2 of 2 killed, 1 because an optimisation was lost, 1 of them with the compiler on" in (
        summary(matrix)
    )
    assert "lost, compiled" in progress_line(1, 3, found["03-quiet"])


def test_no_mutant_is_tried_if_the_unchanged_source_does_not_survive(root: Path) -> None:
    (root / "src" / "hostzero" / "what.py").write_text('BEHAVIOUR = "finds rot"  # not "works"\n')
    matrix = run_matrix(MatrixOptions(seconds=0.5, again=0, seed=7, root=root), lambda *_: None)
    assert matrix.unchanged.verdict == "killed"
    assert matrix.outcomes == ()
    assert not matrix.ok


def test_mutants_are_made_to_a_variant(root: Path) -> None:
    variant = Variant("other", "another form", (Edit("what.py", "BEHAVIOUR =", "BEHAVIOUR = BEHAVIOUR2 ="),))
    options = MatrixOptions(seconds=0.5, again=0, seed=7, root=root, names=("06",), variant=variant)
    (root / "src" / "hostzero" / "__main__.py").write_text(
        (root / "src" / "hostzero" / "__main__.py")
        .read_text()
        .replace("import BEH", "import BEHAVIOUR2, BEH")
    )
    assert run_matrix(options, lambda *_: None).ok
    assert command_of(options).startswith("hostzero check --mutants --name 06 --other --seconds")


def test_a_variant_that_does_not_fit_is_an_error(root: Path) -> None:
    variant = Variant("other", "another form", (Edit("what.py", "ELSE =", "BEHAVIOUR ="),))
    with pytest.raises(HostzeroError, match=r"does not fit what\.py"):
        run_matrix(MatrixOptions(root=root, variant=variant), lambda *_: None)


def test_a_choice_of_nothing_is_a_usage_error(root: Path) -> None:
    with pytest.raises(UsageError, match="none of the 4 mutants"):
        run_matrix(MatrixOptions(root=root, names=("nobody",)), lambda *_: None)


def interrupt(number: int, total: int, outcome: Outcome) -> None:
    if number == 1:
        raise KeyboardInterrupt


def terminate(number: int, total: int, outcome: Outcome) -> None:
    if number == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("how", "error"), [(interrupt, KeyboardInterrupt), (terminate, SystemExit)])
def test_who_is_interrupted_leaves_nothing_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch, how: Any, error: type[BaseException]
) -> None:
    (root / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
    before = signal.getsignal(signal.SIGTERM)
    # One mutant hangs: the end does not wait for it.
    hanging = MUTANT.format(file="07-hang", patch=7, kind="loses", old='"works"', new="input()")
    hanging = hanging.replace("input()", '__import__("signal").pause()')
    (root / "mutants" / "07-hang.toml").write_text(hanging)
    with pytest.raises(error):
        run_matrix(MatrixOptions(seconds=0.5, again=0, seed=7, jobs=2, root=root), how)
    assert list((root / "tmp").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


# ---- processes

LEAVES = """
import os, signal
ready, go = os.pipe()
if os.fork() == 0:
    kept = os.open("fifo", os.O_WRONLY)
    os.write(go, b"x")
    os.close(1)
    os.close(2)
    signal.pause()
os.read(ready, 1)
"""


@pytest.mark.parametrize(("then", "status"), [("", 0), ("signal.pause()", None)])
def test_what_a_process_has_started_ends_with_it(tmp_path: Path, then: str, status: int | None) -> None:
    """Whether it leaves it behind or hangs itself; a pipe whose last writer is gone says so."""
    os.mkfifo(tmp_path / "fifo")
    read = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    timeout = 60.0 if status == 0 else 1.0
    ending = Children().run([sys.executable, "-c", LEAVES + then], tmp_path, os.environ, timeout)
    assert ending.status == status
    os.set_blocking(read, True)
    assert os.read(read, 1) == b""
    os.close(read)


def test_nothing_is_started_after_the_stop(tmp_path: Path) -> None:
    children = Children()
    assert children.run([sys.executable, "-c", "print(1)"], tmp_path, os.environ, 60.0).out == "1\n"
    children.stop()
    with pytest.raises(Stopped):
        children.run([sys.executable, "-c", "print(1)"], tmp_path, os.environ, 60.0)
