# SPDX-License-Identifier: GPL-2.0-only
"""From what a user writes to a target."""

from __future__ import annotations

from hostzero.conform.in_process import InProcessTarget
from hostzero.conform.target import Target
from hostzero.errors import UsageError
from hostzero.ram.backing import BACKINGS

IN_PROCESS = "in-process"


def open_target(text: str, *, backing: str = "memfd") -> Target:
    """Return the target that `text` names: ``in-process``.

    Raises:
        UsageError: it names none, or an option does not fit it.
    """
    if backing not in BACKINGS:
        raise UsageError(f"--backing {backing}: choose one of {', '.join(BACKINGS)}")
    if text == IN_PROCESS:
        return InProcessTarget(backing=backing)
    raise UsageError(f"{text!r} is no target: write {IN_PROCESS}")
