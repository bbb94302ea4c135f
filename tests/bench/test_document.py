# SPDX-License-Identifier: GPL-2.0-only
"""A file is there whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from hostzero.bench.document import to_json, write_atomically
from hostzero.errors import HostzeroError


def test_writes_what_it_was_given(tmp_path: Path) -> None:
    write_atomically(tmp_path / "out.json", b"{}\n")
    assert (tmp_path / "out.json").read_bytes() == b"{}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_the_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "out", b"x")
    (tmp_path / "other").write_bytes(b"x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "out.json"
    target.write_bytes(b"old")

    def fail(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((HostzeroError, KeyboardInterrupt)) as caught:
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {target}: No space left on device"


def test_a_directory_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostzeroError, match=r"cannot write .*/gone/out: No such file"):
        write_atomically(tmp_path / "gone" / "out", b"")


def test_json_is_text_with_a_last_newline() -> None:
    assert to_json({"a": [1]}).endswith("}\n")


def test_json_has_no_word_for_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": math.nan})
