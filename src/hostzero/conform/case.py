# SPDX-License-Identifier: GPL-2.0-only
"""The cases and where they are registered.

A case is one function that takes a `Rig` (`hostzero.conform.rig`). The decorator gives it an id, a
title, the clause that it judges by, and what it needs; the groups are the modules in
`hostzero.conform.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostzero.conform.target import Ability
from hostzero.virtio.features import Feature

if TYPE_CHECKING:
    from hostzero.conform.rig import Rig

NOTHING: Final = Feature(0)

CaseFunction = Callable[["Rig"], None]

LESSONS: Final = {
    1: "a used length is no promise before bit 6 is negotiated",
    2: "MADV_DONTNEED on shared memory succeeds and zeroes nothing",
    3: "a discard on a private file mapping brings the file's bytes back",
    4: "madvise rounds a length up to whole pages",
    5: "a large host page fills up over several requests",
    6: "the bitmap's length is clamped, poison is no zero, a sum attributes no failure",
    7: "bit 6 is REPORTED and bit 7 is ON_INFLATE",
    8: "every head comes back exactly once, also that of a refused request",
    9: "a length is checked together with its address",
    10: "what is offered is done: PAGE_POISON",
    11: "queue numbers are dense over the negotiated features",
    12: "a descriptor of length zero is tolerated",
}
"""What the sources of other devices teach; each is at least one case."""


@dataclass(frozen=True)
class Case:
    """One thing that is asked of a device.

    Attributes:
        id: its name, unique, for `--case` and for lists of known deviations.
        title: what a device has to do, as a sentence without a full stop.
        clause: a clause of virtio 1.3, or "proposal bit 6" and "proposal bit 7".
        module: where it is written; its last part is the subject.
        run: the function.
        offers: features without which the case says nothing.
        needs: what the target has to be able to do.
        lessons: which of `LESSONS` it checks.
    """

    id: str
    title: str
    clause: str
    module: str
    run: CaseFunction
    offers: Feature = NOTHING
    needs: tuple[Ability, ...] = ()
    lessons: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """The subject."""
        return self.module.rpartition(".")[2].replace("_", " ")


_CASES: dict[str, Case] = {}


def case(
    case_id: str,
    title: str,
    clause: str,
    *,
    offers: Feature = NOTHING,
    needs: Iterable[Ability] = (),
    lessons: Iterable[int] = (),
) -> Callable[[CaseFunction], CaseFunction]:
    """Register the decorated function under `case_id`; it stays callable as it is."""

    def register(function: CaseFunction) -> CaseFunction:
        add(case_id, title, clause, function, offers=offers, needs=needs, lessons=lessons)
        return function

    return register


def add(
    case_id: str,
    title: str,
    clause: str,
    function: CaseFunction,
    *,
    offers: Feature = NOTHING,
    needs: Iterable[Ability] = (),
    lessons: Iterable[int] = (),
) -> None:
    """Register a function that is made rather than written, as `case` does.

    Raises:
        ValueError: the id is taken.
    """
    if case_id in _CASES:
        raise ValueError(f"two cases are called {case_id}")
    _CASES[case_id] = Case(
        case_id, title, clause, function.__module__, function, offers, tuple(needs), tuple(sorted(lessons))
    )


def registered() -> tuple[Case, ...]:
    """Return the cases whose modules were imported, in the order of their lines."""
    return tuple(_CASES.values())
