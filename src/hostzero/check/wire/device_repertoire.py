# SPDX-License-Identifier: GPL-2.0-only
"""Which steps a hostile guest knows; `device_steps` fills the list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

Operation = Callable[..., None]
OPERATIONS: Final[dict[str, Operation]] = {}
"""What a step may be, by name."""

WRITES: Final[set[str]] = set()
"""Those steps in which the guest only writes to its memory: nobody can have done anything wrong."""


def operation(function: Operation) -> Operation:
    """Make a function of a world and integers a step of its own name."""
    OPERATIONS[function.__name__] = function
    return function


def guest_write(function: Operation) -> Operation:
    """Make it a step that does not call the device."""
    WRITES.add(function.__name__)
    return operation(function)
