# SPDX-License-Identifier: GPL-2.0-only
"""The mark with a bit of its own: it fits the source, and what is seen with it is told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hostzero.check.teeth.alias import (
    OWN_BIT,
    VARIANTS,
    Comparison,
    about_the_mark,
    compare,
    lives_of,
    to_json,
    to_markdown,
)
from hostzero.check.teeth.alias_life import EVENTS, KERNELS, live
from hostzero.check.teeth.child import Ending
from hostzero.check.teeth.matrix import MatrixOptions
from hostzero.check.teeth.mutants import PACKAGE, ROOT, copied, read_all
from hostzero.errors import HostzeroError

FLAGS = """
import json
from hostzero.mm import page_flags as f
names = [name for name in vars(f) if name.startswith("PG_") and name not in ("PG_zeroed", "PG_reported")]
print(json.dumps([f.PG_zeroed, f.PAGE_FLAGS_CHECK_AT_PREP, f.PAGE_FLAGS_CHECK_AT_FREE,
                  [getattr(f, name) for name in names]]))
"""


def test_the_mark_gets_a_bit_that_nobody_has() -> None:
    """Prepare clears it and an allocation may not have it, but a page freed with it is not bad."""
    with copied("hostzero-test-") as copy:
        OWN_BIT.apply(copy / PACKAGE)
        environment = os.environ | {"PYTHONPATH": str(copy / "src"), "NUMBA_DISABLE_JIT": "1"}
        command = [sys.executable, "-P", "-c", FLAGS]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    zeroed, at_prep, at_free, others = json.loads(ran.stdout)
    assert zeroed not in others
    assert zeroed.bit_count() == 1
    assert zeroed & at_prep
    assert not zeroed & at_free


def test_every_mutant_about_the_mark_fits_the_variant_too() -> None:
    mutants = about_the_mark(MatrixOptions())
    assert len(mutants) > 25
    for mutant in mutants:
        source = (ROOT / PACKAGE / mutant.module).read_text()
        for edit in OWN_BIT.edits:
            if edit.module == mutant.module:
                source = source.replace(edit.old, edit.new)
        changed = OWN_BIT.translate(mutant).apply(source)
        assert "1 << 14" not in changed
        compile(changed, mutant.module, "exec")


def test_only_what_may_hand_out_something_wrong_is_compared() -> None:
    mutants = about_the_mark(MatrixOptions())
    assert {mutant.kind for mutant in mutants} <= {"corrupts", "misbehaves", "masked"}
    assert all(mutant.module.startswith("mm/") for mutant in mutants)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_noted_of_the_source_as_it_is(kernel: str) -> None:
    assert live(3, kernel, 150) == {}


def test_a_life_is_the_same_each_time() -> None:
    assert live(4, "failing", 60) == live(4, "failing", 60)


# ---- telling apart


def a_comparison(alias: Any, own: Any) -> Comparison:
    def lives(noted: dict[str, str] | None) -> Any:
        if noted is None:
            return None
        return {
            kernel: dict.fromkeys(noted[kernel].split(","), 5) if kernel in noted else {}
            for kernel in KERNELS
        }

    return Comparison(read_all()[0], {"as-it-is": lives(alias), "own-bit": lives(own)})


@pytest.mark.parametrize(
    ("alias", "own", "verdict"),
    [
        ({"plain": "wrong bytes"}, {"debug": "wrong bytes"}, "corrupts with either"),
        ({"plain": "wrong bytes"}, {"plain": "stale mark"}, "corrupts only with the alias"),
        ({}, {"plain": "wrong bytes"}, "corrupts only with a bit of its own"),
        ({"debug": "assertion"}, {"plain": "stale mark"}, "seen with either"),
        ({"debug": "assertion"}, {}, "seen only with the alias"),
        ({}, {"debug": "bad page"}, "seen only with a bit of its own"),
        ({}, {}, "not seen"),
        ({}, None, "no result"),
    ],
)
def test_a_verdict_says_what_the_choice_means(alias: Any, own: Any, verdict: str) -> None:
    assert a_comparison(alias, own).verdict == verdict


def test_what_the_checks_stop_only_with_the_alias() -> None:
    assert a_comparison({"hardened": "bad page"}, {}).stopped_by_checks
    assert not a_comparison({"hardened": "bad page"}, {"hardened": "bad page"}).stopped_by_checks
    assert not a_comparison({}, {"hardened": "bad page"}).stopped_by_checks


def test_the_table_names_the_kernels_in_which_something_was_seen() -> None:
    everywhere = dict.fromkeys(KERNELS, "wrong bytes")
    text = to_markdown([a_comparison(everywhere, {"plain": "stale mark", "debug": "assertion"})])
    name = read_all()[0].name
    assert text.splitlines()[2:] == [
        f"| {name} | corrupts only with the alias | wrong bytes | stale mark (plain); assertion (debug) |"
    ]


@pytest.mark.parametrize(("status", "out"), [(1, "{}"), (None, ""), (0, ""), (0, "[]"), (0, '{"plain": {}}')])
def test_a_process_that_ends_otherwise_has_noted_nothing(status: int | None, out: str) -> None:
    assert lives_of(Ending(status, out, "", 1.0)) is None


LIFE = """
import json
from hostzero.mm.page_flags import PG_zeroed, PG_private
from hostzero.mm.what import SETS_PageZeroed
first = {"wrong bytes": 3} if SETS_PageZeroed() == 2 and PG_zeroed == PG_private else {}
print(json.dumps({kernel: first for kernel in KERNELS}))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / PACKAGE
    for room in ("", "check", "check/teeth", "mm"):
        (package / room).mkdir(parents=True, exist_ok=True)
        (package / room / "__init__.py").touch()
    (package / "check" / "teeth" / "alias_life.py").write_text(f"KERNELS = {list(KERNELS)!r}\n{LIFE}")
    flags = "PG_private: int = 1 << 14\nPG_zeroed: Final = PG_private\n"
    (package / "mm" / "page_flags.py").write_text(f"from typing import Final\n{flags}")
    test = "lambda m, dst: (m[dst].flags_f & PG_private) != 0"
    migrate = f"NAMES = lambda: (\n    PG_private,\n)\nTEST = {test}\n"
    (package / "mm" / "migrate_folio.py").write_text(migrate)
    (package / "mm" / "what.py").write_text("def SETS_PageZeroed():\n    return 1\n")
    (tmp_path / "mutants").mkdir()
    (tmp_path / "mutants" / "25-x.toml").write_text(
        'name = "x"\npatch = 25\nsource = "s"\nbreaks = "b"\nkind = "corrupts"\nfile = "mm/what.py"\n'
        'old = "return 1"\nnew = "return 2  # zeroed"\ntests = ["a::b"]\n'
    )
    return tmp_path


def test_each_mutant_lives_in_both_variants(root: Path) -> None:
    said: list[str] = []
    options = MatrixOptions(root=root, jobs=1)
    unchanged, changed = compare(options, 10, lambda number, total, what: said.append(f"{number}/{total}"))
    assert unchanged.verdict == "not seen"
    assert changed.verdict == "corrupts only with the alias"
    assert said == ["1/2", "2/2"]
    assert json.loads(json.dumps(to_json([unchanged, changed])))[1]["verdict"] == changed.verdict
    assert [variant.name for variant in VARIANTS] == list(changed.lives)


def test_an_unchanged_source_in_which_something_is_seen_ends_it(root: Path) -> None:
    what = root / PACKAGE / "mm" / "what.py"
    what.write_text(what.read_text().replace("return 1", "return 2 or 1"))
    (root / "mutants" / "25-x.toml").write_text(
        (root / "mutants" / "25-x.toml").read_text().replace('"return 1"', '"2 or 1"')
    )
    with pytest.raises(HostzeroError, match="the unchanged source"):
        compare(MatrixOptions(root=root, jobs=1), 10, lambda *_: None)


def test_every_event_has_words() -> None:
    assert all(EVENTS.values())
