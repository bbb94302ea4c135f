# SPDX-License-Identifier: GPL-2.0-only
"""When a device has come to rest, told from what it used and from the guest's memory on the host.

No single look tells: between two looks 50 ms apart QEMU's main thread, at rest under software
emulation, may use anything from nothing to a few milliseconds. So a rest is a *stretch* of looks over
which little was used on the whole, and work ended where, seen backwards from there, more was used
than at rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

BUSY: Final = 0.05
"""Share of a CPU that a device uses at rest, at most: QEMU's main thread and its timers, and answers."""

STILL: Final = 1 << 20
"""Bytes by which the guest's memory on the host may change at rest."""

_MORE: Final = 1.25
_SLACK: Final = 0.002
"""Work is what is used beyond so many times the rate at rest and this many CPU seconds."""


class Look(NamedTuple):
    """One look at a device: when, CPU seconds that it had used, bytes that the host had backed."""

    at: float
    device: float
    backed: int


def rests(looks: Sequence[Look], quiet: float) -> bool:
    """Return whether a device has rested for the last `quiet` seconds.

    Args:
        looks: from the first to the last, in order, not empty.
        quiet: seconds.
    """
    last, begin = looks[-1], _before(looks, quiet)
    if begin is None:
        return False
    still = all(abs(look.backed - last.backed) < STILL for look in looks[begin:])
    return still and rate_of(looks[begin:]) <= BUSY


def rate_of(looks: Sequence[Look]) -> float:
    """Return the share of a CPU that a device used from the first look to the last, two at least."""
    first, last = looks[0], looks[-1]
    return (last.device - first.device) / (last.at - first.at)


def end_of_work(looks: Sequence[Look], rate: float) -> int:
    """Return the place of the look from which on a device that `rests` has done no more.

    Args:
        looks: from the first to the last, in order, not empty.
        rate: the share of a CPU that it uses at rest.
    """
    last, found = looks[-1], len(looks) - 1
    while found:
        earlier = looks[found - 1]
        most = _MORE * rate * (last.at - earlier.at) + _SLACK
        if abs(earlier.backed - last.backed) >= STILL or last.device - earlier.device > most:
            break
        found -= 1
    return found


def _before(looks: Sequence[Look], seconds: float) -> int | None:
    # The latest look that is at least so many seconds before the last one.
    until = looks[-1].at - seconds
    return next((place for place in reversed(range(len(looks) - 1)) if looks[place].at <= until), None)
