# SPDX-License-Identifier: GPL-2.0-only
"""What a hostile host tries, and what its guest does meanwhile."""

from __future__ import annotations

import random
from typing import Any, Final

from hostzero.check.recording import Step
from hostzero.check.wire.device_model import EVENT_IDX, INIT_ON_INFLATE, INIT_REPORTED, REPORTING, VERSION_1
from hostzero.check.wire.driver import GUESTS
from hostzero.check.wire.false_device import (
    HONEST,
    JUMP,
    LENGTH,
    LIES,
    OFF_BY,
    RAISE,
    SHORT_BITMAP,
    SOME,
    TWICE,
    WITHHOLD,
    WRONG_ID,
)

_OFFER: Final = 0xFF | EVENT_IDX | VERSION_1
# After these the driver gives the device up, and the episode has not much more to show.
_BREAKING: Final = (WITHHOLD, WRONG_ID, TWICE, JUMP, RAISE)


class DriverMoves:
    """Makes the steps of one episode after the other."""

    def __init__(self, seed: int | str) -> None:
        """Begin at a seed."""
        self._random = random.Random(seed)

    def episode(self) -> tuple[dict[str, Any], list[Step]]:
        """Return which guest it is, and what happens to it."""
        rng = self._random
        guest = rng.choice(["plain", "plain", "plain", *GUESTS])
        # Hinted blocks are of 4 MiB, and a small guest has none to give.
        mib = rng.choice([4, 4, 4, 16])
        steps: list[Step] = [["alloc", rng.randrange(6), 0] for _ in range(rng.randrange(3))]
        for _ in range(rng.choice([1, 1, 2])):
            steps.append(self._probe())
            for _ in range(rng.randrange(4, 16)):
                steps += self._move()
            steps.append(["remove"])
        return {"guest": guest, "mib": mib}, [*steps, ["end"]]

    def _probe(self) -> Step:
        rng = self._random
        few = rng.choice([0.06, 0.06, 0.3])
        offered = _OFFER & ~sum(1 << bit for bit in range(32) if rng.random() < few)
        if rng.random() < 0.06:
            offered &= ~VERSION_1
        if rng.random() < 0.35:
            offered &= ~rng.choice(
                [REPORTING, INIT_REPORTED, INIT_ON_INFLATE, INIT_REPORTED | INIT_ON_INFLATE]
            )
        if rng.random() < 0.05:
            offered = rng.getrandbits(64)
        sizes = [128, 128, 128, 64, 32]
        if rng.random() < 0.3:
            sizes[rng.randrange(5)] = rng.choice([0, 1, 2, 3, 4, 64, 1024, 32768, 65536])
        return ["probe", offered, *sizes]

    def _move(self) -> list[Step]:
        rng = self._random
        kind = rng.random()
        if kind < 0.3:
            return [*self._lies(), ["flush", rng.randrange(7)]]
        if kind < 0.52:
            pages = rng.choice([0, 0, 0, 1, 7, 8, 9, 16, 17, 33, rng.randrange(40), rng.randrange(40)])
            if rng.random() < 0.15:
                # A request has room for 256, and a balloon may have all there is.
                pages = rng.choice([255, 256, 256, 257, 300, 520, 1024, (1 << 32) - 1])
            return [*self._lies(), ["target", pages]]
        if kind < 0.62:
            return [["alloc", rng.choice([0, 0, 1, 2, 3, 5, 9]), rng.randrange(2)]]
        if kind < 0.68:
            return [["free", rng.randrange(24)]]
        if kind < 0.75:
            command = rng.choice([0, 1, 2, 0x80000000, 0x80000001, (1 << 32) - 1])
            return [
                *self._lies(),
                ["command", command],
                *([["command", rng.choice([0, 1])]] * rng.randrange(2)),
            ]
        if kind < 0.77:
            return [["stats"], ["interrupt", rng.randrange(5)]]
        if kind < 0.79:
            return [*self._lies(), ["advance", rng.choice([1, 20, 200, 400])]]
        if kind < 0.82:
            move: Step = rng.choice([["compact"], ["contig", rng.randrange(512), rng.choice([0, 3, 5, 9])]])
            return [["target", rng.choice([5, 9, 33])], *self._lies(), move]
        if kind < 0.84:
            # There is no memory: for the next balloon page, ring, or user.
            after: Step = rng.choice([["alloc", 0, 0], ["target", 40], ["target", 0], ["freeze"]])
            short: list[Step] = [["target", rng.choice([0, 9, 300])], ["hog", rng.choice([0, 1, 3, 20])]]
            return [*short, *self._lies(), after, ["alloc", rng.choice([0, 1, 3]), 0], ["restore", 0]]
        if kind < 0.89:
            # Between the two the host may have changed what it offers.
            change: list[Step] = []
            if rng.random() < 0.4:
                change.append(["offer", _OFFER & ~(1 << rng.randrange(33))])
            if rng.random() < 0.4:
                change.append(["resize", rng.randrange(5), rng.choice([0, 1, 2, 4, 32, 3])])
            # What it has been told just before is what it must remember or forget.
            told: list[Step] = rng.choice([[], [["flush", rng.randrange(7)]], [["target", 9], ["flush", 4]]])
            return [*told, ["freeze"], *change, *self._lies(), ["restore", rng.randrange(2)]]
        if kind < 0.9:
            return [["needs_reset"]]
        which = rng.choice([0, 1, 1, 2, 2, 3])
        value = {0: 1, 1: 1, 2: rng.randrange(4), 3: rng.randrange(1, 24)}[which]
        steps: list[Step] = [["fault", which, value], *self._lies(), ["target", rng.choice([0, 5, 9])]]
        if rng.random() < 0.3:
            steps.append(["fault", which, 4 if which == 2 else 0])
        return steps

    def _lies(self) -> list[Step]:
        rng = self._random
        steps: list[Step] = []
        for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
            kind = rng.choice([HONEST, LENGTH, OFF_BY, SHORT_BITMAP, SOME, SOME, rng.randrange(LIES)])
            if kind in _BREAKING and rng.random() < 0.5:
                kind = OFF_BY
            value = rng.choice([0, 1, 2, 3, 8, 31, 4095, 4096, 8192, 1 << 31, (1 << 32) - 1])
            if kind == OFF_BY:
                value = rng.choice([-4096, -8, -1, 0, 1, 8, 4096])
            elif kind == SOME:
                value = rng.getrandbits(16)
            steps.append(["lie", kind, value])
        return steps
