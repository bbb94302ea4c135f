# SPDX-License-Identifier: GPL-2.0-only
"""The two decorators, and where the compiled form is kept."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from hostzero import jit


@jit.inline
def double(x: int) -> int:
    return 2 * x


@jit.compiled
def double_all(values: object, offset: int) -> int:
    total = 0
    for i in range(len(values)):  # type: ignore[arg-type]
        values[i] = double(values[i]) + offset  # type: ignore[index]
        total += values[i]  # type: ignore[index]
    return total


def test_compiled_code_changes_the_callers_array() -> None:
    values = np.array([1, 2, 3], dtype=np.int64)
    assert double_all(values, 1) == 15
    assert values.tolist() == [3, 5, 7]


@pytest.mark.compiled_only
def test_a_constant_argument_does_not_compile_a_function_again() -> None:
    """One form with plain integers: each constant would be a type of its own otherwise."""

    @jit.compiled
    def callee(x: int) -> int:
        return x + 1

    @jit.compiled
    def caller(x: int) -> int:
        return callee(3) + callee(4) + callee(x)

    assert caller(5) == 15
    assert len(callee.signatures) == 1  # type: ignore[attr-defined]


@pytest.mark.compiled_only
def test_an_error_leaves_compiled_code_as_it_is() -> None:
    @jit.compiled
    def refuse(x: int) -> int:
        if x > 2:
            raise ValueError("more than two")
        return x

    assert refuse(2) == 2
    with pytest.raises(ValueError, match="more than two"):
        refuse(3)


def test_without_the_compiler_a_function_stays_what_it_is() -> None:
    assert hasattr(double_all, "py_func") == jit.COMPILER_ON


def test_an_edit_anywhere_in_the_sources_starts_a_new_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(jit, "_sources", lambda: [source])
    before = jit._digest()
    assert jit._digest() == before
    source.write_text("a = 2\n")
    assert jit._digest() != before


def test_every_compiled_module_is_among_the_sources() -> None:
    root = Path(jit.__file__).parent
    compiled = {
        path
        for path in root.rglob("*.py")
        if "import compiled" in (text := path.read_text()) or "import inline" in text
    }
    assert compiled
    above = compiled - {Path(jit.__file__)} - set(jit._sources())
    rooms = {path.relative_to(root).parts[0] for path in above}
    assert rooms
    # What is compiled above `mm` is kept by the room's own sources.
    assert all(jit._directory_of(room).parent == jit.CACHE_DIR for room in rooms)
    assert {path for room in rooms for path in (root / room).rglob("*.py")} >= above


def test_an_edit_above_mm_starts_a_new_directory_for_its_room_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "attic" / "inner"
    room.mkdir(parents=True)
    (room / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    jit._directory_of.cache_clear()
    try:
        before = jit._directory_of("attic")
        (room / "a.py").write_text("a = 2\n")
        jit._directory_of.cache_clear()
        assert before != jit._directory_of("attic")
        assert jit._directory_of("mm") == jit._directory_of("nothing of ours") == jit.CACHE_DIR
    finally:
        jit._directory_of.cache_clear()


def test_the_oldest_caches_are_removed_unless_somebody_uses_them(tmp_path: Path) -> None:
    names = [f"compiled-{i:02}" for i in range(jit._KEPT + 3)]  # the first is the newest
    for name in [*names, "other"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "code").touch()
    in_use = jit._lock(tmp_path / names[-2], fcntl.LOCK_SH)
    for age, name in enumerate([*names, "other"]):
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    jit._forget_old_caches(tmp_path, tmp_path / names[0])
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert left == [*names[: jit._KEPT], names[-2], "other"]
    os.close(in_use)
    jit._forget_old_caches(tmp_path, tmp_path / names[0])
    assert not (tmp_path / names[-2]).exists()


@pytest.mark.compiled_only
def test_a_process_holds_the_cache_that_it_uses() -> None:
    with pytest.raises(BlockingIOError):
        jit._lock(jit.CACHE_DIR, fcntl.LOCK_EX)


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit._cache_root() == tmp_path / "hostzero"


def test_a_directory_that_cannot_be_made_does_not_stop_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert jit._cache_root().name == f"hostzero-{os.getuid()}"


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(jit, "_usable", lambda directory: False)
    assert jit._cache_root().name == f"hostzero-{os.getuid()}"


def test_numbas_own_variable_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert jit._set_up_cache() == tmp_path / f"hostzero-{jit._digest()}"


def test_a_cache_is_warm_once_it_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "CACHE_DIR", tmp_path / "new")
    assert jit.is_warm() == (not jit.COMPILER_ON)
    jit.mark_warm()
    assert jit.is_warm()
