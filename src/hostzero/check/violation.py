# SPDX-License-Identifier: GPL-2.0-only
"""What a search has found: one violation, with all that a kernel engineer needs to see."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, Self

from hostzero.errors import HostzeroError

Kind = Literal["corruption", "rot", "lost"]

KINDS: Final[dict[Kind, str]] = {
    "corruption": "somebody reads bytes that are not what they should be, or is promised so",
    "rot": "no wrong byte yet: a list, flag, counter or ring is in a state that leads there",
    "lost": "a page that the lifecycle table says is known to be zero was zeroed again, or told again",
}


@dataclass(frozen=True)
class Violation:
    """One thing that must never be.

    Attributes:
        kind: one of `KINDS`.
        what: what is wrong, in one sentence.
        pfn: the page it is about, if it is about one.
        order: the order of the block that holds the page.
        where: the list that the block is on, or who owns it.
        claim: what was claimed of the page, and by whom.
        wrong_offset: the first wrong byte: its offset in the block.
        wrong_value: what that byte holds.
        history: the page's last events, the oldest first.
    """

    kind: Kind
    what: str
    pfn: int | None = None
    order: int | None = None
    where: str = ""
    claim: str = ""
    wrong_offset: int | None = None
    wrong_value: int | None = None
    history: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what there is to say, line by line."""
        said = [f"{self.kind}: {self.what}"]
        if self.pfn is not None:
            order = "" if self.order is None else f" in a block of order {self.order}"
            said.append(f"  page   {self.pfn:#x}{order}")
        for label, text in (("on", self.where), ("claim", self.claim)):
            if text:
                said.append(f"  {label:6} {text}")
        if self.wrong_offset is not None:
            value = "" if self.wrong_value is None else f" is {self.wrong_value:#04x}"
            said.append(f"  byte   {self.wrong_offset:#x}{value}")
        if self.history:
            said.append("  events of this page, the oldest first")
            said += [f"    {event}" for event in self.history]
        return said

    def with_history(self, history: tuple[str, ...]) -> Self:
        """Return the same with the page's events."""
        return replace(self, history=history)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            TypeError, ValueError: it is something else.
        """
        if not isinstance(fields, dict):
            raise TypeError("a violation is an object")
        if fields.get("kind") not in KINDS:
            raise ValueError(f"no kind of violation: {fields.get('kind')!r}")
        violation = cls(**{**fields, "history": tuple(fields.get("history", ()))})
        numbers = (violation.pfn, violation.order, violation.wrong_offset, violation.wrong_value)
        texts = (violation.what, violation.where, violation.claim, *violation.history)
        if not all(number is None or isinstance(number, int) for number in numbers):
            raise TypeError("a violation's page, order, offset and byte are whole numbers")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("what a violation says is text")
        return violation


class Violated(HostzeroError):
    """A search found a violation; `violation` has it."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.what)
        self.violation = violation
