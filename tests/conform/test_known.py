# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.conform.known import apply_known, load_known
from hostzero.conform.result import Outcome
from hostzero.conform.suite import all_cases
from hostzero.errors import UsageError
from tests.conform.results import ABSENT, FAILED, MISSED, PASSED

ROOT = Path(__file__).resolve().parents[2]
IDS = {result.case.id for result in (PASSED, FAILED, MISSED, ABSENT)}


def written(folder: Path, text: str) -> Path:
    path = folder / "known.toml"
    path.write_text(text)
    return path


def test_the_reasons_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, '[deviations]\ninflate-bad = "tracker 7"\n"number-dense" = "by design"\n')
    assert load_known(path) == {"inflate-bad": "tracker 7", "number-dense": "by design"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("deviations =", "is no TOML"),
        ("", "needs one table"),
        ('[deviation]\nx = "y"\n', "needs one table"),
        ('[deviations]\n[more]\nx = "y"\n', "needs one table"),
        ("[deviations]\nx = 3\n", "x needs its reason"),
        ('[deviations]\nx = " "\n', "x needs its reason"),
    ],
)
def test_what_is_no_such_list_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_known(written(tmp_path, text))


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_known(tmp_path / "none.toml")


def test_failures_and_missed_shoulds_are_marked_with_their_reason() -> None:
    known = {"inflate-bad": "tracker 7", "negotiate-some": "by design"}
    marked, stale = apply_known([PASSED, FAILED, MISSED, ABSENT], known, IDS)
    assert [result.outcome for result in marked] == [
        Outcome.PASS,
        Outcome.KNOWN,
        Outcome.KNOWN,
        Outcome.NOT_APPLICABLE,
    ]
    assert marked[1].reason == "tracker 7"
    assert marked[1].misses == FAILED.misses
    assert stale == {}


def test_an_entry_whose_case_passes_or_is_none_is_stale() -> None:
    known = {"inflate-good": "was broken", "inflate-gone": "was renamed"}
    _, stale = apply_known([PASSED, FAILED], known, IDS)
    assert stale == {"inflate-good": "the case passes", "inflate-gone": "there is no such case"}


def test_an_entry_whose_case_did_not_run_or_says_nothing_is_neither() -> None:
    _, stale = apply_known([ABSENT], {"stats-none": "why", "inflate-bad": "why"}, IDS)
    assert stale == {}


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "known").glob("*.toml")), ids=lambda path: path.stem)
def test_the_lists_in_docs_name_cases_that_there_are(path: Path) -> None:
    assert set(load_known(path)) <= {case.id for case in all_cases()}
