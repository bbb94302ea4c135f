# SPDX-License-Identifier: GPL-2.0-only
"""Preparing a cache from packages of our own, with stand-ins for apt and dpkg."""

from __future__ import annotations

import lzma
import platform
from pathlib import Path

import pytest

from hostzero.errors import UsageError, VmError
from hostzero.vm import prepared
from hostzero.vm.progress import Silent
from hostzero.vm.qemu import BINARY
from hostzero.vm.setup import decompress, disk_use, setup
from tests.vm.debian import Debian
from tests.vm.stand_in import write_qemu

RELEASE = "7.2.1-cloud-amd64"
IMAGE = f"linux-image-{RELEASE}"
MODULE = f"./usr/lib/modules/{RELEASE}/kernel/drivers/virtio/virtio_balloon.ko.xz"


@pytest.fixture
def own(debian: Debian, tmp_path: Path) -> Path:
    """A machine with a QEMU of its own, and an archive with a kernel and busybox."""
    if platform.machine() != "x86_64":
        pytest.fail("the guest is an x86-64 one; the tests of its preparation need that machine, too")
    debian.package("busybox-static", "1.37", {"./bin/busybox": b"BUSYBOX", "./etc/other": b"x"})
    debian.package(
        IMAGE, "7.2.1-1", {f"./boot/vmlinuz-{RELEASE}": b"KERNEL", MODULE: lzma.compress(b"MODULE")}
    )
    write_qemu(tmp_path / "tools" / BINARY)
    return tmp_path / "tools" / BINARY


def test_a_cache_is_prepared_once_with_the_machine_s_qemu(debian: Debian, own: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ready = setup(cache, Silent())
    assert ready.qemu.argv == (str(own),)
    assert ready.kernel_release == RELEASE
    assert ready.packages == {"busybox-static": "1.37", IMAGE: "7.2.1-1"}
    assert ready.kernel.read_bytes() == b"KERNEL"
    assert (cache / prepared.MODULE).read_bytes() == b"MODULE"
    assert not (cache / "apt").exists()
    calls = len(debian.calls)
    assert setup(cache, Silent()) == ready
    assert len(debian.calls) == calls
    assert setup(cache, Silent(), fresh=True) == ready
    assert len(debian.calls) > calls


def test_a_cache_that_was_damaged_is_prepared_again(own: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    setup(cache, Silent()).kernel.write_bytes(b"broken")
    assert setup(cache, Silent()).kernel.read_bytes() == b"KERNEL"


def test_an_interrupted_run_leaves_no_cache_that_counts(debian: Debian, own: Path, tmp_path: Path) -> None:
    debian.break_network()
    with pytest.raises(VmError, match="apt-get update failed"):
        setup(tmp_path / "cache", Silent())
    with pytest.raises(UsageError, match="nothing is prepared"):
        prepared.load(tmp_path / "cache")


def test_without_a_qemu_that_will_do_debian_s_is_unpacked(debian: Debian, own: Path, tmp_path: Path) -> None:
    write_qemu(own, version="7.2.0")
    debian.package("qemu-system-x86", "1:11.1", {"./usr/bin/other": b"", "./usr/share/doc/x": b""})
    with pytest.raises(VmError, match="does not run"):
        setup(tmp_path / "cache", Silent())  # this one has no loader; it was unpacked, without its documents
    assert (tmp_path / "cache/qemu/usr/bin/other").exists()
    assert not (tmp_path / "cache/qemu/usr/share/doc").exists()


def test_a_package_without_a_module_is_said(debian: Debian, own: Path, tmp_path: Path) -> None:
    debian.package(IMAGE, "7.2.1-1", {f"./boot/vmlinuz-{RELEASE}": b"KERNEL"})
    with pytest.raises(VmError, match=r"have no virtio_balloon\.ko"):
        setup(tmp_path / "cache", Silent())


def test_another_machine_is_told(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UsageError, match="this machine is aarch64"):
        setup(tmp_path / "cache", Silent())


def test_a_folder_that_cannot_be_made(own: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot make the cache folder"):
        setup(tmp_path / "file" / "cache", Silent())


def test_modules_are_decompressed_by_their_names() -> None:
    assert decompress("a.ko.xz", lzma.compress(b"code")) == b"code"
    assert decompress("a.ko", b"code") == b"code"
    with pytest.raises(VmError, match=r"a.ko.xz is not an xz file"):
        decompress("a.ko.xz", b"code")


def test_zstd_is_asked_for_where_it_is_missing(debian: Debian) -> None:
    with pytest.raises(UsageError, match="install the package zstd"):
        decompress("a.ko.zst", b"")


def test_a_file_with_two_names_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    alone = disk_use(tmp_path)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert disk_use(tmp_path) == alone >= 100_000
