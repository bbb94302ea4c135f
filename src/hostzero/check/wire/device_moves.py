# SPDX-License-Identifier: GPL-2.0-only
"""What a hostile guest tries: requests that are almost right, one or two fields broken.

A request of random bytes is refused at its first field and reaches nothing behind it. So most of
what is made here is what a driver would send, and each field has a small chance to be replaced
by a value at an edge: of a page, of a region, of an integer. Everything comes from one random
source, and the steps that come out need none.
"""

from __future__ import annotations

import random
from typing import Any, Final

# Imported for its steps, which make themselves known.
import hostzero.check.wire.device_pauses  # noqa: F401
from hostzero.check.recording import Step
from hostzero.check.wire.device import QUEUE_SIZES
from hostzero.check.wire.device_model import (
    EVENT_IDX,
    FREE_PAGE_HINT,
    INIT_ON_INFLATE,
    INIT_REPORTED,
    MUST_TELL_HOST,
    PAGE,
    PAGE_POISON,
    REPORTING,
    STATS_VQ,
)
from hostzero.check.wire.device_places import ANSWERS_AT, ARRAYS_AT, Places
from hostzero.check.wire.device_requests import Requests
from hostzero.check.wire.device_steps import RINGS_AT
from hostzero.check.wire.shadow import RECEIVED, SHAPES
from hostzero.check.wire.wire_rings import INDIRECT, NEXT, WRITE

ALL: Final = (
    MUST_TELL_HOST
    | STATS_VQ
    | 4
    | FREE_PAGE_HINT
    | PAGE_POISON
    | REPORTING
    | INIT_REPORTED
    | INIT_ON_INFLATE
    | EVENT_IDX
)

EDGES: Final = (0, 1, 2, 3, 4, 7, 8, 255, 256, 2048, 4095, 4096, 4097, 8191, 8192, 65535, 65536)
LENGTHS: Final = (*EDGES, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 4096)


class Moves:
    """Makes the steps of one episode after the other."""

    def __init__(self, seed: int | str) -> None:
        """Begin at a seed."""
        self._random = random.Random(seed)
        self._roles: list[str] = []
        self._sizes: list[int] = []
        self._places = Places(self._random)
        self._requests = Requests(self._random, self._places)

    def episode(self) -> tuple[dict[str, Any], list[Step]]:
        """Return how the device is made, and what the guest does to it."""
        rng = self._random
        offered = ALL & ~self._some_bits(0.12)
        if not offered & REPORTING:
            offered &= ~INIT_REPORTED
        setup: dict[str, Any] = {
            "offered": offered,
            "backing": rng.choice(["anonymous", "memfd", RECEIVED]),
            "granule": rng.choice([1, 8]),
            "discard_hints": int(rng.random() < 0.3),
            "shape": rng.randrange(len(SHAPES)),
            "proves": int(rng.random() < 0.93),
        }
        self._places.forget(setup["shape"])
        steps: list[Step] = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            steps += self._start(offered)
            for _ in range(rng.randrange(6, 22)):
                # On a host that drops eight pages in one piece, requests for parts of one must meet.
                pieces = setup["granule"] > 1 and rng.random() < 0.25
                steps += self._pieces() if pieces else self._move(offered)
        # Whatever was done: after a reset a proper request is served.
        steps += [["reset"], *([["allow"]] * sum(step[0] == "inhibit" for step in steps))]
        steps += self._start(offered, broken=0.0)
        for _ in range(3):
            steps += self._request(0.0, rng.randrange(len(self._roles)))
        return setup, steps

    # ------------------------------------------------------------------ starting

    def _start(self, offered: int, broken: float = 0.15) -> list[Step]:
        rng = self._random
        # Nearly all of the bits, or any of them.
        word = offered & ~self._some_bits(rng.choice([0.1, 0.1, 0.1, 0.5]))
        if rng.random() < 0.4:
            # Whether the device may remember is a bit on which much depends.
            word &= ~MUST_TELL_HOST
        self._roles = ["inflate", "deflate"]
        for bit, role in ((STATS_VQ, "stats"), (FREE_PAGE_HINT, "free-page"), (REPORTING, "reporting")):
            if word & bit:
                self._roles.append(role)
        steps: list[Step] = []
        if broken and word & PAGE_POISON and rng.random() < 0.4:
            steps.append(["write_config", 12, 4, rng.choice([0, 0xAAAAAAAA, 1])])
        if rng.random() >= broken:
            at = rng.choice([0, 0, 0, 65535, 65530])
            bits = rng.choice([0, 1, 2, 3, 5, 5, 5])
            self._sizes = [min(QUEUE_SIZES[role], 1 << bits) for role in self._roles]
            places = self._places.rings(self._sizes) if rng.random() < 0.5 * bool(broken) else []
            if not places:
                self._places.usual_rings(len(self._roles))
            return [["start", word, bits, at, *places], *steps]
        return steps + self._broken_start(word)

    def _broken_start(self, word: int) -> list[Step]:
        rng = self._random
        steps: list[Step] = [["status", 0], ["status", 1], ["status", 3]]
        kind = rng.random()
        # One bit more than is offered, or all of them at random; VERSION_1 is part of a good word.
        more = 1 << rng.randrange(40) if kind < 0.3 else 0
        steps.append(["features", word | 1 << 32 | more if kind < 0.85 else rng.getrandbits(66)])
        steps.append(["status", 11])
        first = rng.choice([RINGS_AT, RINGS_AT, 1 << 28])
        self._sizes = [4] * len(self._roles)
        self._places.usual_rings(len(self._roles))
        for index in range(len(self._roles)):
            base = (first + index) * PAGE
            size = 1 << rng.randrange(4)
            places = [size, base, base + 1024, base + 2048, rng.choice([0, 65534])]
            if rng.random() < 0.4:
                at = rng.randrange(4)
                places[at] = rng.choice([0, 3, 64, 32768, 65536]) if at == 0 else self._places.address(base)
            steps.append(["setup", index if rng.random() < 0.9 else rng.randrange(-1, 7), *places])
        steps.append(["status", 15])
        if rng.random() < 0.5:
            at = rng.randrange(len(steps))
            steps[at] = ["status", rng.choice([0, 1, 3, 7, 11, 15, 64, 75, 79, 128, 143, 32, 256, -1])]
        return steps

    # ------------------------------------------------------------------ what comes after

    def _move(self, offered: int) -> list[Step]:
        rng = self._random
        kind = rng.random()
        index = rng.randrange(len(self._roles))
        if kind < 0.58:
            return self._request(0.3, index)
        if kind < 0.65:
            return self._batch(index, rng.choice([2, 2, 3]))
        if kind < 0.7:
            return self._raw(index)
        if kind < 0.72:
            # Some pages of what is named cannot be dropped; the host may get over it.
            batch = self._batch(index, rng.choice([1, 2]))
            page = rng.choice([*self._requests.named, self._places.page()])
            return [
                ["stuck", page, rng.choice([1, 1, 2, 8])],
                *batch,
                *([["stuck", 0, 0]] * rng.randrange(2)),
            ]
        if kind < 0.75:
            count = rng.choice([1, 1, 2, 3])
            return [
                ["fail_discard", rng.choice([0, 0, 1, 2]), 1 + rng.randrange(5)],
                *self._batch(index, count),
            ]
        if kind < 0.79:
            return [[rng.choice(["inhibit", "allow"])], *self._request(0.1, index)]
        if kind < 0.83:
            offset, width = rng.choice([(4, 4), (12, 4), (0, 16), (5, 2), (15, 2), (16, 1), (-1, 4)])
            value = rng.choice([0, 1, 7, 0xAAAAAAAA, rng.getrandbits(128)])
            return [["write_config", offset, width, value], ["read_config", rng.choice([0, 4, 13]), 4]]
        if kind < 0.86:
            action = rng.choice([1, 2, 2, 3])
            return [["at_interrupt", action, rng.randrange(5), rng.randrange(8)], *self._batch(index, 2)]
        if kind < 0.89:
            flags = rng.choice([0, 0, 1])
            event = rng.choice([0, 1, 2, 65535, 65534])
            return [["avail_flags", index, flags], ["used_event", index, event]]
        if kind < 0.93:
            return self._hints()
        if kind < 0.945:
            return [["request_stats"]]
        if kind < 0.96:
            return [["set_target", rng.choice([0, 1, 16, 100, 176, 177, -1, 1 << 32])]]
        if kind < 0.995:
            return self._pause(offered)
        return [["reset"], *self._start(offered)]

    def _hints(self) -> list[Step]:
        # A run of hints as its driver does it, or something like it.
        rng = self._random
        steps: list[Step] = [["hint", rng.choice([0, 0, 0, 1, 2])]]
        if "free-page" not in self._roles:
            return steps
        index = self._roles.index("free-page")
        for _ in range(rng.choice([0, 1, 1, 2])):
            steps += [["put_command", ANSWERS_AT, rng.choice([0, 0, 0, 0, 1, -1])]]
            steps += [["chain", index, 0, ANSWERS_AT, 4, 0], ["kick", index]]
            for _ in range(rng.choice([1, 1, 2])):
                before, fields = self._requests.pages_request(0.1, self._sizes[index])
                steps += [*before, ["chain", index, 0, *fields], ["kick", index]]
            if rng.random() < 0.3:
                steps.append(["hint", rng.choice([0, 1, 2])])
        return steps

    def _pause(self, offered: int) -> list[Step]:
        # The guest is paused and goes on; what it had asked for last may still wait.
        rng = self._random
        index = rng.randrange(len(self._roles))
        # So may buffers that the device keeps, or gives back because it stops.
        steps = [*self._request(0.15, index), *self._request(0.15, index)][: rng.choice([-1, None])]
        if rng.random() < 0.3:
            steps.append(["at_interrupt", rng.choice([1, 2, 3]), rng.randrange(5), rng.randrange(8)])
        if rng.random() < 0.6:
            between = self._request(0.15, index) if rng.random() < 0.3 else []
            return [*steps, ["stop", index], *between, ["resume", index], ["kick", index]]
        steps += [["suspend"], *[["same_memory"]] * rng.randrange(2)]
        if rng.random() < 0.3:
            steps.append(["write_config", 12, 4, rng.choice([0, 1])])
        return [*steps, ["wake", offered & ~self._some_bits(rng.choice([0.0, 0.0, 0.1]))]]

    def _batch(self, index: int, count: int) -> list[Step]:
        # Several requests and one notification.
        rng = self._random
        steps: list[Step] = []
        index = rng.choice([0, index])
        self._requests.meeting = True
        for _ in range(count):
            steps += self._request(0.15, index)[:-1]
        self._requests.meeting = False
        if rng.random() < 0.15:
            return [*steps, ["kick_some", index, rng.choice([1, 1, 2])], ["kick", index]]
        return [*steps, ["kick", index]]

    def _request(self, wrong: float, index: int) -> list[Step]:
        rng = self._random
        role = self._roles[index]
        before: list[Step] = []
        fields: list[int] = []
        if role in {"inflate", "deflate"}:
            before, fields = self._requests.pfn_request(wrong, role, self._sizes[index])
        elif role == "stats":
            length = rng.choice([10, 20, 30, 35, 160])
            values = [rng.getrandbits(64) << 16 | rng.randrange(18) for _ in range(0, length, 10)]
            tags = [["put", ANSWERS_AT + 10 * at, 10, value] for at, value in enumerate(values)]
            before, fields = tags, [ANSWERS_AT, length, 0]
            if rng.random() < 0.4:
                before = [["request_stats"], *before]
        elif role == "free-page" and rng.random() < 0.4:
            command = rng.choice([0x8000_0000 + n for n in range(4)] + [0, 1])
            before, fields = [["put", ANSWERS_AT, 4, command]], [ANSWERS_AT, 4, 0]
            if rng.random() < 0.5:
                before.append(["hint", 0])
        else:
            before, fields = self._requests.pages_request(wrong, self._sizes[index])
        fields = self._break(fields, wrong)
        if len(fields) > 3 and rng.random() < 0.1 * bool(wrong):
            # Another order of the same descriptors: readable behind writable, say.
            first, rest = fields[:3], fields[3:]
            fields = rest + first
        steps: list[Step] = [*before, ["chain", index, rng.choice([0, 0, 1, 3, 7]), *fields]]
        if rng.random() < 0.25 * bool(wrong):
            steps.append(self._twist(index))
        if rng.random() < 0.1 * bool(wrong):
            near = fields[0] if fields else 0
            steps.append(["race", rng.randrange(3), self._places.address(near), rng.choice(LENGTHS)])
        steps.append(["kick", index if rng.random() > wrong / 20 else rng.randrange(-1, 7)])
        return steps

    def _pieces(self) -> list[Step]:
        # Parts of one piece of eight pages go into the balloon and out of it, and are used between.
        rng = self._random
        first = self._places.piece(self._places.page())
        steps: list[Step] = [["dirty", first, 8]]
        for _ in range(rng.randrange(2, 6)):
            half = first + rng.choice([0, 4])
            count = rng.choice([4, 4, 8]) if half == first else 4
            index = rng.choice([0, 0, 1])
            # The answer may go to a page that was given away before.
            answer = (
                ANSWERS_AT if rng.random() < 0.7 else (first + rng.randrange(8)) * PAGE + rng.choice([0, 1])
            )
            bitmap = [answer, 1, WRITE] if index == 0 and rng.random() < 0.8 else []
            broken = rng.random() < (0.35 if index else 0.1)
            length = 4 * count + (rng.choice([-1, 2, 20000]) if broken else 0)
            steps.append(["run", ARRAYS_AT, half, count])
            steps.append(["chain", index, 0, ARRAYS_AT, length, 0, *bitmap])
            steps.append(["kick", index])
            if index == 1:
                steps.append(["dirty", half, count])
        return steps

    def _break(self, fields: list[int], wrong: float) -> list[int]:
        rng = self._random
        for at in range(len(fields)):
            if rng.random() >= wrong / 4:
                continue
            if at % 3 == 0:
                fields[at] = self._places.address(fields[at])
            elif at % 3 == 1:
                fields[at] = rng.choice([*LENGTHS, fields[at] + rng.choice([-4, -1, 1, 2, 2048, PAGE])])
                fields[at] = max(fields[at], 0)
            else:
                fields[at] ^= rng.choice([WRITE, WRITE, INDIRECT, NEXT, 8, 0x8000])
        return fields

    def _twist(self, index: int) -> Step:
        # One write into the ring behind the driver's back, between the request and the notification.
        rng = self._random
        kind = rng.randrange(4)
        if kind == 0:
            return ["avail_idx", index, rng.choice([0, 1, 2, 9, 33, 65535, rng.getrandbits(16)])]
        if kind == 1:
            return ["offer", index, rng.choice([0, 1, 2, 7, 8, 31, 32, 65535])]
        if kind == 2:
            # The first descriptors name each other.
            return ["desc", index, rng.randrange(4), ARRAYS_AT, 4, NEXT, rng.randrange(4)]
        flags = rng.choice([NEXT, NEXT | WRITE, WRITE, INDIRECT | NEXT])
        return [
            "desc",
            index,
            rng.randrange(4),
            self._places.address(0),
            rng.choice(LENGTHS),
            flags,
            rng.randrange(40),
        ]

    def _raw(self, index: int) -> list[Step]:
        rng = self._random
        base = (RINGS_AT + index) * PAGE + rng.choice([0, 0, 1024, 1024, 2048])
        gpa = base + rng.randrange(rng.choice([8, 32, 128, 600]))
        width = rng.choice([1, 2, 4, 8, 16])
        value = rng.choice([0, 1, (1 << 128) - 1, rng.getrandbits(128)])
        return [["put", gpa, width, value], ["kick", index]]

    def _some_bits(self, chance: float) -> int:
        return sum(1 << bit for bit in range(40) if self._random.random() < chance)
