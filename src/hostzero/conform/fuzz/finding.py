# SPDX-License-Identifier: GPL-2.0-only
"""What can be found, and how it is told."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any


class Kind(enum.StrEnum):
    """What does not hold."""

    DIED = "died"
    """The backend's process is gone, or nobody listens at its socket any more."""
    SILENT = "silent"
    """A request on the vhost-user socket or in a ring is not answered."""
    STATUS = "status"
    """The control socket does not answer as it has to."""
    ENDED = "ended"
    """A session was ended though the framing of its messages was kept."""
    REFUSED = "refused"
    """A well-formed request is refused because of what came before."""
    DESCRIPTORS = "descriptors"
    """Descriptors are left of a session, or too many are held in one."""
    MAPPINGS = "mappings"
    """Guest memory stays mapped after a session."""
    MEMORY = "memory"
    """The process grows."""
    LOG = "log"
    """The log grows faster than a disk should have to bear."""
    CONTENT = "content"
    """Bytes changed that no request gave away."""
    CLAIM = "claim"
    """Memory was said to be zero and is not, or an answer is none that the request can have."""


class Found(Exception):
    """Something does not hold; raised where it is seen, and turned into a `Finding` above."""

    def __init__(self, kind: Kind, text: str) -> None:
        """Say what, and with which values."""
        super().__init__(text)
        self.kind = kind


class Ended(Exception):
    """The backend has ended the session."""


@dataclass(frozen=True)
class Finding:
    """Something that does not hold.

    Attributes:
        kind: what.
        text: with which values.
        seed: of the run.
        episode: in which connection.
        step: after how many steps of it.
        last: what was done last, newest last.
    """

    kind: Kind
    text: str
    seed: int
    episode: int
    step: int
    last: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON has words for."""
        return asdict(self) | {"kind": self.kind.value, "last": list(self.last)}
