# SPDX-License-Identifier: GPL-2.0-only
"""The host's side of a hostzero device that is tried over its vhost-user socket: its control socket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from hostzero.errors import ControlError, TargetError
from hostzero.units import PAGE_SIZE
from hostzero.vhost_user.control_client import ControlClient
from hostzero.virtio.balloon import StatTag


class Control:
    """One connection to a control socket."""

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            UsageError: nobody listens at `path`.
        """
        self._client = ControlClient.open(path)

    def resize(self, pages: int) -> None:
        """Ask for `pages` pages of 4 KiB in the balloon."""
        self._request("resize", balloon_bytes=pages * PAGE_SIZE)

    def request_stats(self) -> None:
        """Ask the guest for statistics."""
        self._request("stats")

    def stats(self) -> Mapping[StatTag, int]:
        """Return the latest statistics that the device has."""
        figures = self._request("status")["statistics"]
        assert isinstance(figures, dict)
        by_name = {tag.name.lower(): tag for tag in StatTag}
        return {by_name[name]: int(value) for name, value in figures.items() if name in by_name}

    def hint(self, action: str) -> None:
        """Start, stop or finish (``done``) a run of free page hinting."""
        self._request("hint", action=action)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def _request(self, command: str, **arguments: object) -> dict[str, object]:
        try:
            return self._client.request(command, **arguments)
        except ControlError as error:
            raise TargetError(f"control socket: {error}") from error
