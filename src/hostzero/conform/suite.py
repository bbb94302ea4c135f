# SPDX-License-Identifier: GPL-2.0-only
"""All the cases, and the ones that a user means."""

from __future__ import annotations

from collections.abc import Iterable

from hostzero.conform import cases
from hostzero.conform.case import Case, registered
from hostzero.errors import UsageError


def all_cases() -> tuple[Case, ...]:
    """Return every case, in the order of `cases.MODULES` and of their lines."""
    order = [module.__name__ for module in cases.MODULES]
    return tuple(sorted(registered(), key=lambda case: order.index(case.module)))


def select(names: Iterable[str]) -> tuple[Case, ...]:
    """Return the cases that `names` mean, in the suite's order; all for no name.

    A name is an id, or a beginning such as ``bit6-``.

    Raises:
        UsageError: a name means no case.
    """
    every = all_cases()
    wanted = tuple(names)
    if not wanted:
        return every
    for name in wanted:
        if not any(each.id.startswith(name) for each in every):
            raise UsageError(f"--case {name}: there is no such case; --list shows them all")
    # An id that is the beginning of others means itself alone.
    exact = {each.id for each in every}
    return tuple(
        each
        for each in every
        if any(each.id == name if name in exact else each.id.startswith(name) for name in wanted)
    )
