# SPDX-License-Identifier: GPL-2.0-only
"""From what a user writes to a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hostzero.conform.in_process import InProcessTarget
from hostzero.conform.qemu import QemuTarget
from hostzero.conform.target import Target
from hostzero.conform.vhost_user import VhostUserTarget
from hostzero.errors import UsageError
from hostzero.ram.backing import BACKINGS

IN_PROCESS = "in-process"
UNIX = "unix:"


def open_target(
    text: str | None,
    *,
    control: Path | None = None,
    backing: str = "memfd",
    qemu: str | None = None,
    qemu_arguments: Sequence[str] = (),
) -> Target:
    """Return the target that a user names.

    Args:
        text: ``in-process``, or the path of a vhost-user socket, with or without ``unix:``.
        control: the path of a hostzero device's control socket, for cases that need the host's
            side of a device behind a vhost-user socket.
        backing: one of `hostzero.ram.BACKINGS`.
        qemu: instead of `text`, a QEMU whose own balloon is meant.
        qemu_arguments: more arguments for that QEMU.

    Raises:
        UsageError: there is no such target, or an option does not fit it.
    """
    if backing not in BACKINGS:
        raise UsageError(f"--backing {backing}: choose one of {', '.join(BACKINGS)}")
    if qemu is not None:
        return _qemu(text, control, backing, qemu, qemu_arguments)
    if qemu_arguments:
        raise UsageError("--qemu-arg is for --qemu PATH")
    if text is None:
        raise UsageError("TARGET or --qemu PATH is missing: what is to be judged? --help names the kinds")
    if text == IN_PROCESS:
        if control is not None:
            raise UsageError(f"--control is for a device behind a socket, and {IN_PROCESS} has none")
        return InProcessTarget(backing=backing)
    path = Path(text.removeprefix(UNIX))
    _expect_a_file(backing, "a backend")
    if not path.is_socket():
        raise UsageError(f"{text}: is no socket; TARGET is {IN_PROCESS} or the path of a vhost-user socket")
    return VhostUserTarget(path, control, backing)


def _qemu(
    text: str | None, control: Path | None, backing: str, qemu: str, arguments: Sequence[str]
) -> QemuTarget:
    if text is not None:
        raise UsageError(f"{text}: a run judges one device; leave out TARGET or --qemu")
    if control is not None:
        raise UsageError("--control is for a device of hostzero, and --qemu has QEMU's monitor")
    _expect_a_file(backing, "QEMU")
    return QemuTarget(qemu, arguments, backing)


def _expect_a_file(backing: str, who: str) -> None:
    if backing == "anonymous":
        raise UsageError(f"--backing anonymous: {who} maps guest memory, which needs a file")
