# SPDX-License-Identifier: GPL-2.0-only
"""A file is there whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from hostzero.document import check_output, to_json, write_atomically
from hostzero.errors import HostzeroError, UsageError


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


def test_an_output_in_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--json .*: there is no directory .*/none"):
        check_output("--json", tmp_path / "none" / "out.json")


def test_an_output_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        check_output("--json", tmp_path)


def test_an_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="there is no directory"):
        check_output("--json", tmp_path / "file" / "out.json")


def test_an_output_in_a_read_only_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root may write anywhere, so the answer of access(2) is played."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written to"):
        check_output("--json", tmp_path / "out.json")


def test_checking_an_output_writes_nothing(tmp_path: Path) -> None:
    check_output("--json", tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []
