# SPDX-License-Identifier: GPL-2.0-only
"""A sequence of steps that fails, as a file: `hostzero check --replay FILE` runs it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from hostzero.check.violation import Violation
from hostzero.document import write_atomically
from hostzero.errors import HostzeroError, UsageError

FORMAT: Final = "hostzero-check"
VERSION: Final = 1

Step = list[Any]
"""The name of what is done, and its arguments: JSON values."""


@dataclass(frozen=True)
class Recording:
    """What a search did, and what it found at the end.

    Attributes:
        search: the name of the search that can run it again.
        setup: how the guest is made, in terms of that search: JSON values.
        steps: what is done to it, in order.
        violation: what is found after the last step.
    """

    search: str
    setup: dict[str, Any]
    steps: tuple[Step, ...]
    violation: Violation

    def to_json(self) -> dict[str, Any]:
        """Return the recording as a JSON document."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "search": self.search,
            "setup": self.setup,
            "steps": [list(step) for step in self.steps],
            "violation": self.violation.to_json(),
        }

    def save(self, path: Path) -> None:
        """Write the recording to a file, one step a line.

        Raises:
            UsageError: the file cannot be written.
        """
        document = self.to_json()
        steps = ",\n    ".join(json.dumps(step) for step in document.pop("steps"))
        head = json.dumps(document, indent=2).removesuffix("\n}")
        try:
            write_atomically(path, f'{head},\n  "steps": [\n    {steps}\n  ]\n}}\n'.encode())
        except HostzeroError as error:
            raise UsageError(f"the recording is lost: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            UsageError: the file cannot be read or is no recording.
        """
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{path}: is no recording of hostzero check: {error}") from error
        try:
            return cls.from_json(document)
        except KeyError as error:
            raise UsageError(f"{path}: is no recording of hostzero check: it lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}: is no recording of hostzero check: {error}") from error

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        if document["version"] != VERSION:
            raise ValueError(f"its version is {document['version']!r}, this program reads {VERSION}")
        steps, setup = document["steps"], document["setup"]
        if not isinstance(setup, dict) or not isinstance(document["search"], str):
            raise TypeError("search is a name, setup an object")
        if not isinstance(steps, list) or not all(
            isinstance(step, list) and step and isinstance(step[0], str) for step in steps
        ):
            raise TypeError("a step is a list that begins with a name")
        violation = Violation.from_json(document["violation"])
        return cls(document["search"], setup, tuple(steps), violation)
