# SPDX-License-Identifier: GPL-2.0-only
"""A QEMU that has the generic vhost-user device: how to call it, and whether it will do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hostzero.errors import VmError

BINARY: Final = "qemu-system-x86_64"
DEVICE: Final = "vhost-user-test-device-pci"
"""QEMU's generic vhost-user device, under the name that it has since 10.2."""
OLDEST: Final = (10, 2)

_VERSION: Final = re.compile(r"QEMU emulator version (?P<version>(?P<major>\d+)\.(?P<minor>\d+)[.\d]*)")
_LIBRARIES: Final = Path("usr/lib/x86_64-linux-gnu")
_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Qemu:
    """How to call a QEMU.

    Attributes:
        argv: the program and the arguments that it always needs.
        environment: what is added to the environment.
        version: as it says itself.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    def ask(self, *arguments: str) -> str:
        """Return what it prints for `arguments`.

        Raises:
            VmError: it does not start, or refuses them.
        """
        environment = {**os.environ, **self.environment}
        try:
            done = subprocess.run(
                [*self.argv, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            raise VmError(f"{self.argv[0]} does not run: {said[-1] if said else error}") from error
        return done.stdout


def parse_version(text: str) -> tuple[int, int, str] | None:
    """Return major, minor and the whole version of ``--version`` output, or None."""
    match = _VERSION.search(text)
    return (int(match["major"]), int(match["minor"]), match["version"]) if match else None


def examine(qemu: Qemu) -> Qemu:
    """Return `qemu` with its version, if it will do.

    Raises:
        VmError: it does not run, is too old, or was built without the device.
    """
    found = parse_version(qemu.ask("--version"))
    if found is None:
        raise VmError(f"{qemu.argv[0]} does not say which version of QEMU it is")
    if found[:2] < OLDEST:
        raise VmError(
            f"QEMU {found[2]} has no generic vhost-user device; {OLDEST[0]}.{OLDEST[1]} is the first"
        )
    if f'name "{DEVICE}"' not in qemu.ask("-device", "help"):
        raise VmError(f"QEMU {found[2]} at {qemu.argv[0]} was built without {DEVICE}")
    return Qemu(qemu.argv, qemu.environment, found[2])


def on_this_machine() -> Qemu | None:
    """Return the machine's own QEMU if it will do, else None."""
    path = shutil.which(BINARY)
    if path is None:
        return None
    try:
        return examine(Qemu((path,)))
    except VmError:
        return None


def unpacked(root: Path) -> Qemu:
    """Return how to call a Debian QEMU whose packages, with the C library's, were unpacked below `root`.

    It is run by its own loader with its own libraries, so that the machine's do not matter.
    """
    libraries = root / _LIBRARIES
    share = root / "usr/share"
    loader = libraries / "ld-linux-x86-64.so.2"
    called = (str(loader), "--library-path", str(libraries), str(root / "usr/bin" / BINARY))
    firmware = ("-L", str(share / "qemu"), "-L", str(share / "seabios"))
    return Qemu((*called, *firmware), {"QEMU_MODULE_DIR": str(libraries / "qemu")})
