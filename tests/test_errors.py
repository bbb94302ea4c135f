# SPDX-License-Identifier: GPL-2.0-only
"""One tree: whoever catches `HostzeroError` catches everything that hostzero finds wrong."""

from __future__ import annotations

import inspect

import pytest

from hostzero import errors

PARENTS = {
    "UsageError": "HostzeroError",
    "RamError": "HostzeroError",
    "RangeError": "RamError",
    "BackingUnavailable": "RamError",
    "MmError": "HostzeroError",
    "OutOfMemory": "MmError",
    "MemcgOutOfMemory": "OutOfMemory",
    "BadAddress": "MmError",
    "VmBug": "MmError",
    "VirtioError": "HostzeroError",
    "RingError": "VirtioError",
    "NegotiationError": "VirtioError",
    "DeviceError": "HostzeroError",
    "DriverError": "HostzeroError",
    "VmError": "HostzeroError",
    "ControlError": "HostzeroError",
    "VhostUserError": "HostzeroError",
    "MessageError": "VhostUserError",
    "ConnectionLost": "VhostUserError",
    "TargetError": "HostzeroError",
}


@pytest.mark.parametrize(("child", "parent"), sorted(PARENTS.items()))
def test_the_tree_is_as_documented(child: str, parent: str) -> None:
    assert getattr(errors, child).__bases__ == (getattr(errors, parent),)
    assert errors.__doc__ is not None
    assert child in errors.__doc__


def test_there_is_no_error_outside_of_the_tree() -> None:
    classes = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if value.__module__ == errors.__name__ and value is not errors.HostzeroError
    }
    assert classes == set(PARENTS)
    assert errors.HostzeroError.__bases__ == (Exception,)
