# SPDX-License-Identifier: GPL-2.0-only
"""What `hostzero vm setup` has prepared: where it lies, and whether it is whole.

A cache folder holds::

    manifest.json   what is here, with versions and checksums; written last
    qemu/           Debian's QEMU and its libraries, unless the machine's own QEMU will do
    guest/          vmlinuz, busybox, virtio_balloon.ko
    initramfs.gz    built from those by `load`, so that it is always this version's
    apt/            apt's own folder, while there is something to fetch
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hostzero.document import to_json, write_atomically
from hostzero.errors import UsageError, VmError
from hostzero.vm.initramfs import build
from hostzero.vm.qemu import Qemu, unpacked

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
KERNEL: Final = "guest/vmlinuz"
INITRAMFS: Final = "initramfs.gz"
BUSYBOX: Final = "guest/busybox"
MODULE: Final = "guest/virtio_balloon.ko"
QEMU: Final = "qemu"


def default_cache() -> Path:
    """Return the folder below the user's cache directory."""
    configured = os.environ.get("XDG_CACHE_HOME")
    return (Path(configured) if configured else Path.home() / ".cache") / "hostzero" / "vm"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A cache that is whole.

    Attributes:
        cache: the folder.
        qemu: how to call QEMU.
        kernel_release: what the guest's ``uname -r`` says.
        packages: name to version, of everything that came from Debian.
        size: bytes on disk of the files in the manifest.
    """

    cache: Path
    qemu: Qemu
    kernel_release: str
    packages: Mapping[str, str]
    size: int

    @property
    def kernel(self) -> Path:
        """The guest's kernel."""
        return self.cache / KERNEL

    @property
    def initramfs(self) -> Path:
        """The guest's root file system."""
        return self.cache / INITRAMFS

    def to_document(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "cache": str(self.cache),
            "qemu": {"version": self.qemu.version, "argv": list(self.qemu.argv)},
            "kernel": {"release": self.kernel_release, "path": str(self.kernel)},
            "initramfs": str(self.initramfs),
            "bytes": self.size,
            "packages": dict(self.packages),
        }


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(cache: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of every regular file of QEMU and of the guest, by relative path."""
    paths = [path for folder in (QEMU, "guest") for path in sorted((cache / folder).rglob("*"))]
    return {
        str(path.relative_to(cache)): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
        if path.is_file() and not path.is_symlink()
    }


def write_manifest(
    cache: Path,
    *,
    own_qemu: Qemu | None,
    version: str,
    release: str,
    packages: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write down what is in a cache; from here on it counts as prepared.

    Args:
        cache: the folder.
        own_qemu: the machine's QEMU if that is used, None for the one unpacked into the cache.
        version: QEMU's.
        release: the kernel's.
        packages: name to version, size and sha256.
    """
    document = {
        "format": FORMAT,
        "qemu": {"version": version, "path": None if own_qemu is None else own_qemu.argv[0]},
        "kernel": release,
        "packages": {name: dict(values) for name, values in packages.items()},
        "files": describe_files(cache),
    }
    write_atomically(cache / MANIFEST, to_json(document).encode())


def load(cache: Path) -> Prepared:
    """Return what is prepared in `cache`.

    Sizes are compared for every file, checksums for those that run; that takes well under a second.

    Raises:
        UsageError: nothing is prepared there.
        VmError: something is, but not whole; the text says what is wrong.
    """
    path = cache / MANIFEST
    if not path.is_file():
        raise UsageError(f"nothing is prepared in {cache}: run 'hostzero vm setup' first")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise VmError(f"{path} was written by another version of hostzero")
        own, version = manifest["qemu"]["path"], manifest["qemu"]["version"]
        files, packages, release = manifest["files"], manifest["packages"], manifest["kernel"]
        versions = {name: values["version"] for name, values in packages.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise VmError(f"{path} cannot be read: {error!r}") from error
    if own is not None and not os.access(own, os.X_OK):
        raise VmError(f"{own} is gone, which was this machine's QEMU")
    size = 0
    for name, expected in files.items():
        _check(cache / name, expected, thorough=_runs(name))
        size += expected["size"]
    image = build((cache / BUSYBOX).read_bytes(), (cache / MODULE).read_bytes())
    initramfs = cache / INITRAMFS
    if not initramfs.exists() or initramfs.read_bytes() != image:
        write_atomically(initramfs, image)
    base = Qemu((own,)) if own is not None else unpacked(cache / QEMU)
    qemu = Qemu(base.argv, base.environment, version)
    return Prepared(cache, qemu, release, versions, size)


def _runs(name: str) -> bool:
    return name.startswith(("guest/", f"{QEMU}/usr/bin/")) or "/ld-linux" in name


def _check(path: Path, expected: Mapping[str, Any], *, thorough: bool) -> None:
    if not path.is_file():
        raise VmError(f"{path} is missing")
    if path.stat().st_size != expected["size"]:
        raise VmError(f"{path} has {path.stat().st_size} bytes, not {expected['size']}")
    if thorough and sha256(path) != expected["sha256"]:
        raise VmError(f"{path} has been changed")
