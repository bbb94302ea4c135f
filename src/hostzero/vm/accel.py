# SPDX-License-Identifier: GPL-2.0-only
"""KVM or software emulation: found out by booting, because /dev/kvm opens in places where it cannot.

A KVM that has no hardware virtualization below it (in a cloud's virtual machine, say) may run
guests made for it and no stock kernel. So the guest is booted once under KVM; the verdict is
kept until this machine boots again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostzero.document import to_json, write_atomically
from hostzero.errors import UsageError, VmError
from hostzero.vm.command_line import GuestOptions
from hostzero.vm.guest import Guest
from hostzero.vm.prepared import Prepared
from hostzero.vm.progress import Progress

CHOICES: Final = ("auto", "kvm", "tcg")
TRIAL_SECONDS: Final = 25.0
"""A stock guest under hardware KVM is up in one or two."""
_VERDICT: Final = "accel.json"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_KVM: Final = Path("/dev/kvm")


@dataclass(frozen=True, slots=True)
class Accel:
    """How guests run here.

    Attributes:
        name: ``kvm`` or ``tcg``.
        why: if it is ``tcg``, why it is not ``kvm``; one line.
    """

    name: str
    why: str = ""


def choose(prepared: Prepared, wanted: str, progress: Progress) -> Accel:
    """Return how guests run on this machine.

    Args:
        prepared: what is booted to find out.
        wanted: ``auto``, ``kvm`` or ``tcg``.
        progress: told if a trial is made.

    Raises:
        UsageError: ``kvm`` was wanted and does not work; the text says why.
    """
    if wanted == "tcg":
        return Accel("tcg", "asked for")
    why = _device_refused(_KVM)
    if why is None:
        why = _verdict(prepared, progress)
    if not why:
        return Accel("kvm")
    if wanted == "kvm":
        raise UsageError(f"KVM does not work here: {why} (--accel tcg runs the guest without it)")
    return Accel("tcg", why)


def _device_refused(path: Path) -> str | None:
    if not path.exists():
        return f"there is no {path}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{path} does not open: {error.strerror}"
    return None


def _verdict(prepared: Prepared, progress: Progress) -> str:
    """Return why KVM does not work, or nothing."""
    path = prepared.cache / _VERDICT
    key = [_BOOT_ID.read_text().strip(), prepared.qemu.version, prepared.kernel_release]
    try:
        kept = json.loads(path.read_text())
        if kept["key"] == key and isinstance(kept["why"], str):
            return kept["why"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no verdict yet
    progress.stage("booting a guest under KVM, to see whether that works here")
    why = _try_kvm(prepared)
    write_atomically(path, to_json({"key": key, "why": why}).encode())
    return why


def _try_kvm(prepared: Prepared) -> str:
    with Guest(prepared, GuestOptions(accel="kvm", hostzero=False)) as guest:
        try:
            guest.start(TRIAL_SECONDS)
        except VmError as error:
            return str(error)
    return ""
