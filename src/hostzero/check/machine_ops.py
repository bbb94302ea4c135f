# SPDX-License-Identifier: GPL-2.0-only
"""The operations of the search `machine`: a table of names, functions and ranges of integers.

An operation takes the world and integers, from 0 to the largest that the table says. It takes them
modulo what there is, so that every sequence of operations can be run, also one that has lost some of
its steps; one that finds nothing to do does nothing. So a step is a line of a file, and needs
nothing but the steps before it to mean the same again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hostzero.check.laws import history_of
from hostzero.check.violation import Violated, Violation
from hostzero.errors import BadAddress, HostzeroError, MmError, OutOfMemory, UsageError
from hostzero.units import PAGE_SIZE

if TYPE_CHECKING:
    from hostzero.check.users import Area, User
    from hostzero.check.world import World

Run = Callable[..., None]

LENGTHS: Final = (1, 2, 17, 64, 512, 700)
"""How many pages an operation on a range is about."""


@dataclass(frozen=True)
class Operation:
    """One thing that can happen to a machine.

    Attributes:
        name: what a recording calls it.
        run: what is called with the world and the arguments.
        names: of its arguments.
        most: the largest value of each argument.
        isolates: it takes blocks off the free lists other than by allocating them, or forgets claims.
        weight: how often it is drawn, next to the others.
        when: whether there is anything to do for it; a search saves itself the step if not.
    """

    name: str
    run: Run
    names: tuple[str, ...]
    most: tuple[int, ...]
    isolates: bool | Callable[[World], bool]
    weight: int
    when: Callable[[World], bool]


def _always(_world: World) -> bool:
    return True


OPERATIONS: Final[dict[str, Operation]] = {}


def operation(
    *,
    isolates: bool | Callable[[World], bool] = False,
    weight: int = 1,
    when: Callable[[World], bool] = _always,
    **most: int,
) -> Callable[[Run], Run]:
    """Put a function into the table; its arguments go from 0 to the number given for each."""

    def register(function: Run) -> Run:
        name = function.__name__
        names = list(inspect.signature(function).parameters)[1:]
        if names != list(most) or name in OPERATIONS:
            raise ValueError(f"{name}: the ranges are of {list(most)}, the arguments are {names}")
        OPERATIONS[name] = Operation(
            name, function, tuple(most), tuple(most.values()), isolates, weight, when
        )
        return function

    return register


def load_operations() -> dict[str, Operation]:
    """Return the whole table."""
    from hostzero.check import (  # noqa: F401 - they register themselves
        machine_ops_failure,
        machine_ops_host,
        machine_ops_hugetlb,
        machine_ops_kernel,
        machine_ops_processes,
        machine_ops_ranges,
    )

    return OPERATIONS


def perform(world: World, step: Sequence[Any]) -> None:
    """Do one step and check everything.

    Raises:
        Violated: something is as it must never be, or hostzero itself says so.
        UsageError: it is no step of this search.
    """
    operation_of = OPERATIONS.get(step[0])
    arguments = step[1:]
    if operation_of is None or len(arguments) != len(operation_of.most):
        raise UsageError(
            f"{step[0]!r} with {len(arguments)} arguments is no operation of the search `machine`"
        )
    if not all(isinstance(argument, int) and argument >= 0 for argument in arguments):
        raise UsageError(f"search `machine`: {step[0]!r} takes numbers from 0 on, not {list(arguments)!r}")
    said = " ".join(map(str, step))
    isolates = operation_of.isolates
    if callable(isolates):
        isolates = isolates(world)
    guard(world, lambda: operation_of.run(world, *arguments), said, isolates=isolates)


def guard(world: World, call: Callable[[], None], said: str, *, isolates: bool = True) -> None:
    """Make a call, check everything after it, and turn what hostzero itself finds wrong into a violation."""
    world.isolates = isolates
    world.step = said
    try:
        call()
        world.check(said)
    except Violated as violated:
        if violated.violation.pfn is not None and not violated.violation.history:
            history = (*history_of(world.oracle.events, violated.violation.pfn), f"{said}: found here")
            raise Violated(violated.violation.with_history(history)) from None
        raise
    except HostzeroError as error:
        # The text without numbers: the same defect is the same defect on another page.
        text = str(error.__cause__ or error)
        what = re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", text.split(": pfn ", 1)[0])
        raise Violated(Violation("rot", f"{type(error).__name__}: {what}", claim=str(error))) from error


FAILS: Final = (OutOfMemory, BadAddress)
"""What a process may meet that asks for memory at its limit or at the guest's; never a failed assertion."""


def tolerate(call: Callable[[], Any]) -> bool:
    """Make a call that may lack memory or hit a page that the hardware took; return whether it was done."""
    from hostzero.errors import VmBug

    try:
        call()
    except VmBug:
        raise
    except FAILS:
        return False
    except MmError as error:
        if "SIGBUS" in str(error):
            return False
        raise
    return True


def areas(world: World, *, huge: bool | None = None) -> list[tuple[User, Area]]:
    """Return all mappings, or those of huge pages, or the others."""
    return [
        (user, area) for user in world.users for area in user.areas if huge is None or (area.unit > 1) == huge
    ]


def makes_gigantic_pages(world: World) -> bool:
    """Return whether the guest has gigantic pages, for which ranges are isolated, also in vain."""
    return bool(world.mm.config.gigantic_order)


def anything_mapped(world: World) -> bool:
    """Return whether a process has a mapping."""
    return any(user.areas for user in world.users)


def some_pages(
    world: World, which: int, at: int, length: int, *, huge: bool | None = None
) -> tuple[User, Area, int, int] | None:
    """Choose pages of a mapping, whole units of it if these stay together; None if nothing is mapped."""
    chosen = areas(world, huge=huge)
    if not chosen:
        return None
    user, area = chosen[which % len(chosen)]
    units = (area.end - area.start) // area.unit
    first = area.start + at % units * area.unit
    pages = LENGTHS[length % len(LENGTHS)]
    return user, area, first, min(area.end, first + max(pages // area.unit, 1) * area.unit)


def span(first: int, end: int) -> tuple[int, int]:
    """Return an address and a length in bytes for pages `[first, end)`."""
    return first * PAGE_SIZE, (end - first) * PAGE_SIZE
