# SPDX-License-Identifier: GPL-2.0-only
"""From what a user writes to a target."""

from __future__ import annotations

from pathlib import Path

from hostzero.conform.in_process import InProcessTarget
from hostzero.conform.target import Target
from hostzero.conform.vhost_user import VhostUserTarget
from hostzero.errors import UsageError
from hostzero.ram.backing import BACKINGS

IN_PROCESS = "in-process"
UNIX = "unix:"


def open_target(text: str, *, control: Path | None = None, backing: str = "memfd") -> Target:
    """Return the target that `text` names: ``in-process``, or the path of a vhost-user socket.

    The path may have ``unix:`` before it. `control` is the path of a hostzero device's control
    socket, for cases that need the host's side of a device behind a vhost-user socket.

    Raises:
        UsageError: it names none, or an option does not fit it.
    """
    if backing not in BACKINGS:
        raise UsageError(f"--backing {backing}: choose one of {', '.join(BACKINGS)}")
    if text == IN_PROCESS:
        if control is not None:
            raise UsageError(f"--control is for a device behind a socket, and {IN_PROCESS} has none")
        return InProcessTarget(backing=backing)
    path = Path(text.removeprefix(UNIX))
    if backing == "anonymous":
        raise UsageError("--backing anonymous: a backend maps guest memory, which needs a file")
    if not path.is_socket():
        raise UsageError(f"{text}: is no socket; TARGET is {IN_PROCESS} or the path of a vhost-user socket")
    return VhostUserTarget(path, control, backing)
