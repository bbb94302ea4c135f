# SPDX-License-Identifier: GPL-2.0-only
"""The search "wire": bytes in rings and configuration space that no honest peer would write.

Two fuzzers take turns. In one a hostile guest stands before the device, in the other a hostile
host before the driver. Each runs short episodes of recorded steps on a world of its own, so that
an episode that fails is a recording already.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

# Imported for its steps, which make themselves known.
import hostzero.check.wire.device_pauses
import hostzero.check.wire.device_steps
import hostzero.check.wire.driver_steps  # noqa: F401
from hostzero.check.recording import Recording, Step
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.shrink import shrink_arguments, shrink_steps
from hostzero.check.violation import Violated, Violation
from hostzero.check.wire.device import DeviceWorld
from hostzero.check.wire.device_moves import Moves
from hostzero.check.wire.driver import DriverWorld
from hostzero.check.wire.driver_moves import DriverMoves
from hostzero.errors import HostzeroError, UsageError

SHRINK_SECONDS: Final = 20.0
"""How long a failure is made shorter; it is one from the beginning."""

DEVICE_SHARE: Final = 0.5
"""The part of the time for the device's fuzzer; the rest is the driver's."""


class World(Protocol):
    """What both fuzzers step."""

    def step(self, step: list[Any]) -> None:
        """Do one step and check everything."""

    def close(self) -> None:
        """Give the memory back."""


WORLDS: Final[dict[str, Callable[[dict[str, Any]], World]]] = {"device": DeviceWorld, "driver": DriverWorld}


class WireSearch:
    """Both fuzzers, and replay."""

    name = "wire"
    title = "hostile bytes in rings and configuration space, from either end"

    def prepare(self) -> None:
        """Run an episode of each, so that what has to be compiled is."""
        with _quiet():
            for side, moves in self._moves(0):
                setup, steps = moves.episode()
                run_steps({"side": side, **setup}, steps)

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Search until something is found or the time is up."""
        findings = Findings(self.name)
        done: Counter[str] = Counter()
        episodes: Counter[str] = Counter()
        spent = {"device": 0.0, "driver": 0.0}
        sides = dict(self._moves(seed))
        begun = time.perf_counter()
        with _quiet():
            while (now := time.perf_counter()) - begun < limits.seconds:
                total = spent["device"] + spent["driver"]
                side = "device" if spent["device"] <= DEVICE_SHARE * total else "driver"
                setup, steps = sides[side].episode()
                setup = {"side": side, **setup}
                count, violation = run_steps(setup, steps)
                done[side] += count
                episodes[side] += 1
                spent[side] += time.perf_counter() - now
                findings.operations = done.total()
                progress(findings.operations, None, findings.rows, f"{side}: {episodes[side]} episodes")
                if violation is not None:
                    findings.found_after = findings.operations
                    findings.recording = shrunk(setup, steps[:count], violation)
                    break
        findings.seconds = time.perf_counter() - begun
        for side, what in (("device", "a hostile guest"), ("driver", "a hostile host")):
            rate = done[side] / spent[side] if spent[side] else 0.0
            findings.notes.append(
                f"{what} against the {side}: {done[side]} steps in {episodes[side]} episodes, {rate:,.0f}/s"
            )
        findings.notes.append(
            "left out: a host that promises zeros in the agreed form and breaks the promise, which no driver "
            "can see; rings of two queues that overlap; peers that write while the other end reads"
        )
        return findings

    def replay(self, recording: Recording) -> Violation | None:
        """Run a recording again; return what is found, or None.

        Raises:
            UsageError: the recording is none of this search's.
        """
        try:
            with _quiet():
                return run_steps(recording.setup, recording.steps)[1]
        except (HostzeroError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the recording is none of the search {self.name!r}: {error}") from error

    def _moves(self, seed: int) -> list[tuple[str, Moves | DriverMoves]]:
        return [("device", Moves(f"{seed} device")), ("driver", DriverMoves(f"{seed} driver"))]


def run_steps(setup: dict[str, Any], steps: Sequence[Step]) -> tuple[int, Violation | None]:
    """Make a world and do the steps; return how many were done, and what was found.

    Raises:
        UsageError: there is no such world or step.
    """
    if setup.get("side") not in WORLDS:
        raise UsageError(f"the wire has two sides, and {setup.get('side')!r} is none of them")
    world = WORLDS[setup["side"]](setup)
    count = 0
    try:
        for step in steps:
            count += 1
            world.step(list(step))
    except Violated as found:
        return count, found.violation
    finally:
        world.close()
    return count, None


def shrunk(setup: dict[str, Any], steps: Sequence[Step], violation: Violation) -> Recording:
    """Return a short recording in which the same thing does not hold."""
    until = time.perf_counter() + SHRINK_SECONDS

    def fails(candidate: Sequence[Step]) -> bool:
        if time.perf_counter() > until:
            return False
        found = run_steps(setup, candidate)[1]
        return found is not None and (found.kind, found.what) == (violation.kind, violation.what)

    short: list[Step] = shrink_steps(list(steps), fails)
    short = shrink_arguments(short, fails)
    found = run_steps(setup, short)[1]
    return Recording("wire", setup, tuple(short), found if found is not None else violation)


@contextmanager
def _quiet() -> Iterator[None]:
    # Both ends log what a hostile peer does. Here that is all of it.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
