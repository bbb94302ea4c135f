# SPDX-License-Identifier: GPL-2.0-only
"""What a device has to look like for the suite: how to get a fresh one, and what can be done to it.

A `Target` makes one `Connection` for each case. A connection is one device after reset, with
guest memory of its own that nobody else touches. The suite plays the driver: it writes rings and
buffers into that memory and calls the `Transport`. What only a host can do, such as asking for
another balloon size, is on the connection as well; a target that cannot do it says why in
`missing`, and cases that need it are reported as not applicable.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Protocol, Self, runtime_checkable

from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.balloon import StatTag
from hostzero.virtio.transport import Transport

ARENA_BYTES: Final = 32 << 20
"""The least guest memory that a case has to itself, in bytes."""

NOWHERE_BYTES: Final = 16 << 20
"""The guest space from `Connection.nowhere` on that holds neither RAM nor a device, in bytes."""


class Ability(enum.Enum):
    """What a case may need and a target may lack."""

    SET_TARGET = "change num_pages from the host's side"
    REQUEST_STATS = "ask for statistics from the host's side"
    READ_STATS = "read the statistics that the host's side has"
    HINT = "start, stop and finish free page hinting from the host's side"
    FEATURES_OK = "refuse the driver's features so that the driver sees it"
    INTERRUPTS = "count the used buffer notifications of each queue"
    CONFIG_CHANGES = "count the configuration change notifications"
    RESET = "reset the device and go on with the same connection"


@runtime_checkable
class Connection(Protocol):
    """One fresh device: before `Status.ACKNOWLEDGE`, no queue set up, no page in the balloon.

    Any call may raise `TargetError` if the device went away or no longer answers, and
    `DeviceError` if it refused this call and goes on. Leaving the context closes everything.
    """

    @property
    def transport(self) -> Transport:
        """The device as its driver reaches it.

        `setup_queue` takes the `interrupt` that is called once for each used buffer notification
        (if `Ability.INTERRUPTS` is there), from inside `settle` or from a call to the transport.
        Queue numbers are passed on as they are: the suite decides about numbering.
        """
        ...

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as the device sees it, readable and writable from here.

        `memory.regions[i].ram.resident` tells which parts hold host memory.
        """
        ...

    @property
    def arena(self) -> range:
        """Guest addresses that the case has to itself.

        A multiple of 2 MiB at either end, `ARENA_BYTES` or more, all in one region; it ends where
        RAM ends if that is possible.
        """
        ...

    @property
    def nowhere(self) -> Gpa:
        """The first of `NOWHERE_BYTES` of guest space without RAM and without any device; page aligned."""
        ...

    @property
    def missing(self) -> Mapping[Ability, str]:
        """What this target cannot do, each with the reason as a short sentence."""
        ...

    def settle(self, until: Callable[[], bool], timeout: float) -> bool:
        """Let the device run until `until()` holds or `timeout` seconds are over; return `until()`.

        A device that runs inside the calls to its transport needs no time: one look is enough.
        """
        ...

    def alive(self) -> bool:
        """Return whether the device's process still answers; never raises."""
        ...

    def set_target(self, pages: int) -> None:
        """Have the host ask for `pages` pages of 4 KiB in the balloon."""
        ...

    def request_stats(self) -> None:
        """Have the host ask for fresh statistics."""
        ...

    def stats(self) -> Mapping[StatTag, int]:
        """Return the statistics that the host has; a tag that was never sent is not there."""
        ...

    def hint_start(self) -> None:
        """Have the host start a run of free page hinting; its command id is in the configuration."""
        ...

    def hint_stop(self) -> None:
        """Have the host stop the run."""
        ...

    def hint_done(self) -> None:
        """Have the host end the run, so that the guest may have its pages back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Target(Protocol):
    """Where fresh devices come from.

    Attributes:
        name: what the user gave, such as ``in-process`` or ``unix:/run/balloon.sock``.
    """

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def describe(self) -> Mapping[str, str]:
        """Return what identifies the device for a report, such as a version; by label."""
        ...

    def connect(self) -> Connection:
        """Return a fresh device.

        Raises:
            UsageError: there is no such device, or it cannot be reached; the text says what to do.
            TargetError: there was one, and it no longer answers.
        """
        ...
