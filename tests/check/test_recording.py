# SPDX-License-Identifier: GPL-2.0-only
"""A recording is read as it was written, and anything else is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.check.recording import FORMAT, VERSION, Recording
from hostzero.errors import UsageError
from tests.check.played import VIOLATION, Change, recording_of

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
steps = st.tuples(st.text(min_size=1, max_size=8), st.lists(values, max_size=4)).map(lambda s: [s[0], *s[1]])


@given(st.lists(steps, max_size=6), st.dictionaries(st.text(max_size=5), values, max_size=3))
def test_any_recording_survives_json(done: list[list[Any]], setup: dict[str, Any]) -> None:
    recording = Recording("wire", setup, tuple(done), VIOLATION)
    assert Recording.from_json(json.loads(json.dumps(recording.to_json()))) == recording


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, count: int) -> None:
    recording = Recording("wire", {"pages": 64}, recording_of("wire").steps[:count], VIOLATION)
    recording.save(tmp_path / "r.json")
    assert Recording.load(tmp_path / "r.json") == recording


def test_a_file_has_one_step_a_line_so_that_two_can_be_compared(tmp_path: Path) -> None:
    recording_of("wire").save(tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert [line.strip().rstrip(",") for line in lines if line.startswith('    ["')] == [
        '["alloc", 0, 1]',
        '["write", 64]',
        '["free", 64]',
    ]
    assert json.loads("\n".join(lines))["format"] == FORMAT


def set_to(name: str, value: object) -> Change:
    return lambda document: document.update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_to("format", "hostzero-bench"), "its format is not 'hostzero-check'"),
        (set_to("version", VERSION + 1), f"its version is {VERSION + 1}, this program reads {VERSION}"),
        (lambda document: document.pop("version"), "it lacks 'version'"),
        (lambda document: document.pop("violation"), "it lacks 'violation'"),
        (set_to("setup", []), "setup an object"),
        (set_to("search", 3), "search is a name"),
        (set_to("steps", [["alloc"], "free"]), "a step is a list that begins with a name"),
        (set_to("steps", [[]]), "a step is a list that begins with a name"),
        (set_to("steps", [[1, 2]]), "a step is a list that begins with a name"),
        (set_to("steps", {"alloc": 1}), "a step is a list that begins with a name"),
        (set_to("violation", {"kind": "guess"}), "no kind of violation: 'guess'"),
        (set_to("violation", None), "a violation is an object"),
        (set_to("violation", {"kind": "rot", "what": "w", "pfn": "x"}), "are whole numbers"),
        (set_to("violation", {"kind": "rot", "what": "w", "history": [1]}), "is text"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: Change, said: str) -> None:
    document = recording_of("wire").to_json()
    change(document)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError) as caught:
        Recording.load(path)
    assert str(caught.value).startswith(f"{path}: is no recording of hostzero check: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe\x00", b"NaN"])
def test_bytes_that_are_no_document_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UsageError, match="is no recording of hostzero check"):
        Recording.load(tmp_path / "r.json")


def test_a_file_that_is_not_there_or_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.json: cannot be read: No such file or directory"):
        Recording.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        Recording.load(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the recording is lost: cannot write .*r.json: No such file"):
        recording_of("wire").save(tmp_path / "none" / "r.json")
