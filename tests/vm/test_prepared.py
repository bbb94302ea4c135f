# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hostzero.errors import UsageError, VmError
from hostzero.vm.prepared import BUSYBOX, KERNEL, MANIFEST, MODULE, default_cache, load, write_manifest
from tests.vm.stand_in import write_qemu
from tests.vm.test_cpio import read_back


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that is whole, with a QEMU of this machine."""
    (tmp_path / "guest").mkdir()
    for name, content in ((KERNEL, b"KERNEL"), (BUSYBOX, b"BUSYBOX"), (MODULE, b"MODULE")):
        (tmp_path / name).write_bytes(content)
    qemu = write_qemu(tmp_path / "own-qemu")
    packages = {"linux": {"version": "7.2-1", "size": 6, "sha256": "0"}}
    write_manifest(tmp_path, own_qemu=qemu, version="99.1.0", release="7.2-cloud", packages=packages)
    return tmp_path


def test_what_was_written_is_loaded_and_the_initramfs_is_built(cache: Path) -> None:
    ready = load(cache)
    assert (ready.kernel_release, ready.qemu.version, ready.packages) == (
        "7.2-cloud",
        "99.1.0",
        {"linux": "7.2-1"},
    )
    assert ready.qemu.argv == (str(cache / "own-qemu"),)
    assert ready.size == len(b"KERNELBUSYBOXMODULE")
    files = read_back(gzip.decompress(ready.initramfs.read_bytes()))
    assert files["bin/busybox"][1] == b"BUSYBOX"
    assert ready.to_document()["kernel"]["path"] == str(cache / KERNEL)


def test_an_old_initramfs_is_built_again(cache: Path) -> None:
    load(cache).initramfs.write_bytes(b"old")
    assert load(cache).initramfs.read_bytes() != b"old"


def test_an_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run 'hostzero vm setup' first"):
        load(tmp_path)


def test_a_file_that_is_missing_short_or_changed_is_named(cache: Path) -> None:
    (cache / KERNEL).write_bytes(b"kernel")
    with pytest.raises(VmError, match="vmlinuz has been changed"):
        load(cache)
    (cache / KERNEL).write_bytes(b"K")
    with pytest.raises(VmError, match="has 1 bytes, not 6"):
        load(cache)
    (cache / KERNEL).unlink()
    with pytest.raises(VmError, match="vmlinuz is missing"):
        load(cache)


def test_a_qemu_that_was_removed_is_said(cache: Path) -> None:
    (cache / "own-qemu").unlink()
    with pytest.raises(VmError, match="own-qemu is gone"):
        load(cache)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[1]"])
def test_a_manifest_that_is_none(cache: Path, text: str) -> None:
    (cache / MANIFEST).write_text(text)
    with pytest.raises(VmError, match="cannot be read"):
        load(cache)


def test_another_version_s_manifest(cache: Path) -> None:
    document = json.loads((cache / MANIFEST).read_text()) | {"format": 99}
    (cache / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(VmError, match="another version"):
        load(cache)


def test_the_cache_is_below_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/hostzero/vm")
