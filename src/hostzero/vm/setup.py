# SPDX-License-Identifier: GPL-2.0-only
"""Prepare a QEMU, a stock Debian cloud kernel and a root file system in a cache folder.

::

    manifest whole? ──yes──> done
        │ no
    the machine's QEMU new enough, with the device? ──no──> Debian's, with all its libraries
        │
    resolve > download (what is here and whole is kept) > unpack > examine > manifest

Nothing outside the folder changes. The manifest is written last, so that a run that was
interrupted is done again, with the archives that it had already fetched.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hostzero.document import write_atomically
from hostzero.errors import UsageError, VmError
from hostzero.vm import prepared as layout
from hostzero.vm.apt import Package, PrivateApt
from hostzero.vm.prepared import Prepared
from hostzero.vm.progress import Progress
from hostzero.vm.qemu import Qemu, examine, on_this_machine, unpacked

QEMU_PACKAGES: Final = ("qemu-system-x86",)
GUEST_PACKAGES: Final = ("linux-image-cloud-amd64", "busybox-static")

# The kernel's own packages; what its meta-package pulls in to install it is not needed.
_GUEST: Final = re.compile(r"busybox-static|linux-(image|binary|modules)-[0-9].*-cloud-amd64")
_KERNEL: Final = re.compile(r"(\./)?(boot/vmlinuz-(?P<boot>.+)|usr/lib/modules/(?P<modules>[^/]+)/vmlinuz)")
_MODULE: Final = re.compile(r".*/virtio_balloon\.ko(\.xz|\.zst)?")
_BUSYBOX: Final = re.compile(r"(\./)?(usr/)?bin/busybox")
# Debian's QEMU comes with its documentation and the firmware of other machines.
_NEEDLESS: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")
_SPACE: Final = 500 << 20


def setup(
    cache: Path,
    progress: Progress,
    *,
    mirror: str | None = None,
    qemu: Path | None = None,
    fresh: bool = False,
) -> Prepared:
    """Return the cache, prepared; does nothing if it already is.

    Args:
        cache: the folder; made if missing.
        progress: told of every stage.
        mirror: a Debian mirror; default: the one in the machine's apt sources.
        qemu: a QEMU to use; default: the machine's if it will do, else Debian's newest.
        fresh: prepare again even if all is there, with the newest of everything.

    Raises:
        UsageError: this machine lacks something that only its owner can provide.
        VmError: the network, apt or a package failed.
    """
    if platform.machine() != "x86_64":
        raise UsageError(f"the guest is an x86-64 one, and this machine is {platform.machine()}")
    cache = cache.expanduser().resolve()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the cache folder {cache}: {error.strerror}") from error
    with _locked(cache, progress):
        if not fresh and (ready := _ready(cache, progress, qemu)) is not None:
            return ready
        free = shutil.disk_usage(cache).free
        if free < _SPACE:
            raise UsageError(
                f"{cache} has {free >> 20} MiB free; {_SPACE >> 20} MiB are needed (--cache DIR)"
            )
        _prepare(cache, progress, mirror, qemu)
        return layout.load(cache)


@contextmanager
def _locked(cache: Path, progress: Progress) -> Iterator[None]:
    """Keep a second setup of the same folder waiting."""
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.stage(f"waiting for another hostzero that prepares {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ready(cache: Path, progress: Progress, qemu: Path | None) -> Prepared | None:
    if not (cache / layout.MANIFEST).exists():
        return None
    try:
        ready = layout.load(cache)
    except VmError as error:
        progress.stage(f"preparing again: {error}")
        return None
    if qemu is not None and ready.qemu.argv[0] != str(qemu):
        return None
    return ready


def _prepare(cache: Path, progress: Progress, mirror: str | None, chosen: Path | None) -> None:
    (cache / layout.MANIFEST).unlink(missing_ok=True)
    own = examine(Qemu((str(chosen),))) if chosen is not None else on_this_machine()
    apt = PrivateApt(cache / "apt", mirror)
    apt.update(progress)
    names = [pair for pair in apt.resolve(GUEST_PACKAGES) if _GUEST.fullmatch(pair[0])]
    of_guest = {name for name, _ in names}
    if own is None:
        names += [pair for pair in apt.resolve(QEMU_PACKAGES) if pair[0] not in of_guest]
    packages = apt.describe(names)
    archives = dict(
        zip((package.name for package in packages), apt.download(packages, progress), strict=True)
    )
    progress.stage("unpacking")
    release = _unpack_guest(cache, [archives[name] for name in of_guest])
    shutil.rmtree(cache / layout.QEMU, ignore_errors=True)
    if own is None:
        _unpack_qemu(cache, [path for name, path in archives.items() if name not in of_guest], progress)
    qemu = own or examine(unpacked(cache / layout.QEMU))
    layout.write_manifest(
        cache, own_qemu=own, version=qemu.version, release=release, packages=_as_manifest(packages)
    )
    shutil.rmtree(apt.folder)
    progress.stage(f"QEMU {qemu.version} and Linux {release} are ready in {cache}")


def _as_manifest(packages: Sequence[Package]) -> dict[str, dict[str, object]]:
    return {
        package.name: {"version": package.version, "size": package.size, "sha256": package.sha256}
        for package in packages
    }


def _unpack_qemu(cache: Path, archives: Sequence[Path], progress: Progress) -> None:
    root = cache / layout.QEMU
    for number, path in enumerate(archives):
        progress.at(100 * number / len(archives))
        done = subprocess.run(["dpkg-deb", "-x", path, root], capture_output=True, text=True, check=False)
        if done.returncode:
            raise VmError(f"dpkg-deb cannot unpack {path.name}: {done.stderr.strip()}")
    for name in _NEEDLESS:
        shutil.rmtree(root / name, ignore_errors=True)


def _unpack_guest(cache: Path, archives: Sequence[Path]) -> str:
    """Take the kernel, its balloon module and busybox out of their packages; returns the kernel's release."""
    (cache / "guest").mkdir(exist_ok=True)
    release = ""
    missing = {layout.KERNEL, layout.MODULE, layout.BUSYBOX}
    for path in archives:
        for name, data in _members(path):
            if kernel := _KERNEL.fullmatch(name):
                release = kernel["boot"] or kernel["modules"]
                target = layout.KERNEL
            elif _MODULE.fullmatch(name):
                target, data = layout.MODULE, decompress(name, data)
            else:
                target = layout.BUSYBOX
            write_atomically(cache / target, data)
            missing.discard(target)
    if missing:
        raise VmError(f"Debian's packages have no {', '.join(sorted(Path(name).name for name in missing))}")
    return release


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a package that the guest is made of."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for member in tar:
                    wanted = any(pattern.fullmatch(member.name) for pattern in (_KERNEL, _MODULE, _BUSYBOX))
                    stream = tar.extractfile(member) if wanted and member.isfile() else None
                    if stream is not None:
                        yield member.name, stream.read()
            process.stdout.read()  # to the end, or dpkg-deb complains of a broken pipe
        except tarfile.TarError as error:
            raise VmError(f"{archive.name} cannot be read: {error}") from error
    if process.returncode:
        raise VmError(f"dpkg-deb cannot read {archive.name}")


def decompress(name: str, data: bytes) -> bytes:
    """Return a kernel module as it is loaded; `name` ends in .ko, .ko.xz or .ko.zst.

    Raises:
        UsageError: it is compressed with zstd, and there is no zstd program.
        VmError: the data are not what the name says.
    """
    if name.endswith(".xz"):
        try:
            return lzma.decompress(data)
        except lzma.LZMAError as error:
            raise VmError(f"{name} is not an xz file: {error}") from error
    if name.endswith(".zst"):
        if shutil.which("zstd") is None:
            raise UsageError(f"{name} is compressed with zstd: install the package zstd")
        done = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=False)
        if done.returncode:
            raise VmError(f"{name} is not a zstd file: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout
    return data


def disk_use(folder: Path) -> int:
    """Return the bytes that a folder takes on disk, each file once."""
    blocks = {}
    for path in folder.rglob("*"):
        status = os.lstat(path)
        blocks[status.st_dev, status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512
