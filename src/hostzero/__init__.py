# SPDX-License-Identifier: GPL-2.0-only
"""hostzero: guest pages that the host has zeroed are not zeroed again.

`Machine` joins guest memory, a guest kernel's memory manager, a virtio balloon driver
and a balloon device in one process. It is imported when it is first asked for, so that
a program that only wants the version does not pay for a compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hostzero.machine import Machine, MachineStats

__version__ = "0.1.0"

__all__ = ["Machine", "MachineStats", "__version__"]


def __getattr__(name: str) -> Any:
    if name in {"Machine", "MachineStats"}:
        return getattr(importlib.import_module("hostzero.machine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
