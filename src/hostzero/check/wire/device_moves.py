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

from hostzero.check.recording import Step
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
from hostzero.check.wire.device_steps import RINGS_AT
from hostzero.check.wire.shadow import REGIONS
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

ARRAYS_AT: Final = 48 * PAGE
"""Where page numbers are written: 8 pages of them."""

ANSWERS_AT: Final = 56 * PAGE
"""Where bitmaps go, and other small buffers: 8 pages."""

EDGES: Final = (0, 1, 2, 3, 4, 7, 8, 255, 256, 2048, 4095, 4096, 4097, 8191, 8192, 65535, 65536)
LENGTHS: Final = (*EDGES, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 4096)
TOP: Final = 1 << 64


class Moves:
    """Makes the steps of one episode after the other."""

    def __init__(self, seed: int | str) -> None:
        """Begin at a seed."""
        self._random = random.Random(seed)
        self._roles: list[str] = []
        self._recent: list[int] = []
        self._named: list[int] = [0]
        self._meeting = False

    def episode(self) -> tuple[dict[str, Any], list[Step]]:
        """Return how the device is made, and what the guest does to it."""
        rng = self._random
        offered = ALL & ~self._some_bits(0.12)
        if not offered & REPORTING:
            offered &= ~INIT_REPORTED
        self._recent = []
        setup: dict[str, Any] = {
            "offered": offered,
            "backing": rng.choice(["anonymous", "memfd"]),
            "granule": rng.choice([1, 1, 8]),
            "discard_hints": int(rng.random() < 0.3),
        }
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
        word = offered & ~self._some_bits(0.1)
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
            return [*steps[:0], ["start", word, rng.choice([0, 1, 2, 3, 5, 5, 5]), at], *steps]
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
        for index in range(len(self._roles)):
            base = (first + index) * PAGE
            size = 1 << rng.randrange(4)
            places = [size, base, base + 1024, base + 2048, rng.choice([0, 65534])]
            if rng.random() < 0.4:
                at = rng.randrange(4)
                places[at] = rng.choice([0, 3, 64, 32768, 65536]) if at == 0 else self._address(base)
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
        if kind < 0.75:
            count = rng.choice([1, 1, 2, 3])
            return [["fail_discard", rng.randrange(3), 1 + rng.randrange(5)], *self._batch(index, count)]
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
            return [["hint", rng.choice([0, 0, 0, 1, 2])]]
        if kind < 0.96:
            return [["request_stats"]]
        if kind < 0.98:
            return [["set_target", rng.choice([0, 1, 16, 100, 176, 177, -1, 1 << 32])]]
        return [["reset"], *self._start(offered)]

    def _batch(self, index: int, count: int) -> list[Step]:
        # Several requests and one notification.
        steps: list[Step] = []
        index = self._random.choice([0, index])
        self._meeting = True
        for _ in range(count):
            steps += self._request(0.15, index)[:-1]
        self._meeting = False
        return [*steps, ["kick", index]]

    def _request(self, wrong: float, index: int) -> list[Step]:
        rng = self._random
        role = self._roles[index]
        before: list[Step] = []
        fields: list[int] = []
        if role in {"inflate", "deflate"}:
            before, fields = self._pfn_request(wrong, role)
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
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                page = self._page()
                count = rng.choice([1, 1, 2, 4, 8, 8])
                page -= page % 8 if count == 8 else 0
                if rng.random() < wrong / 3:
                    # Pages that hold a ring or a buffer: given away, and in use.
                    start = rng.choice([ARRAYS_AT, ANSWERS_AT, RINGS_AT * PAGE, RINGS_AT * PAGE])
                    page = start // PAGE + rng.randrange(-2, 6) * (count < 8)
                else:
                    before.append(["dirty", page, count])
                fields += [page * PAGE, count * PAGE, WRITE]
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
            steps.append(["race", rng.randrange(3), self._address(near), rng.choice(LENGTHS)])
        steps.append(["kick", index if rng.random() > wrong / 20 else rng.randrange(-1, 7)])
        return steps

    def _pieces(self) -> list[Step]:
        # Parts of one piece of eight pages go into the balloon and out of it, and are used between.
        rng = self._random
        first = self._page() // 8 * 8
        steps: list[Step] = [["dirty", first, 8]]
        for _ in range(rng.randrange(2, 6)):
            half = first + rng.choice([0, 4])
            count = rng.choice([4, 4, 8]) if half == first else 4
            index = rng.choice([0, 0, 1])
            bitmap = [ANSWERS_AT, 1, WRITE] if index == 0 and rng.random() < 0.8 else []
            broken = rng.random() < (0.35 if index else 0.1)
            length = 4 * count + (rng.choice([-1, 2, 20000]) if broken else 0)
            steps.append(["run", ARRAYS_AT, half, count])
            steps.append(["chain", index, 0, ARRAYS_AT, length, 0, *bitmap])
            steps.append(["kick", index])
            if index == 1:
                steps.append(["dirty", half, count])
        return steps

    def _pfn_request(self, wrong: float, role: str) -> tuple[list[Step], list[int]]:
        rng = self._random
        at = ARRAYS_AT + rng.choice([0, 0, 4, PAGE, PAGE - 4, 2 * PAGE - 2])
        first = self._page()
        count = rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 24])
        # A host that drops eight pages in one piece sees a piece come in two requests.
        if rng.random() < 0.3:
            first -= first % 8
            half = rng.choice([0, 4])
            numbers = list(range(first + half, first + half + 4))
        else:
            numbers = [first + n for n in range(count)]
        shape = rng.random()
        if shape < 0.2:
            numbers.reverse()
        elif shape < 0.4:
            rng.shuffle(numbers)
        elif shape < 0.5:
            numbers += numbers[: rng.randrange(4)]
        for n in range(len(numbers)):
            if rng.random() < wrong / 6:
                numbers[n] = rng.choice(
                    [0, self._page(), 95, 96, 143, 144, 255, 272, (1 << 32) - 1, 48, 56, 64]
                )
        pages = sorted({number - number % 8 for number in numbers if role == "inflate"})[:6]
        steps: list[Step] = [["dirty", page, 8] for page in pages]
        steps.append(["pfns", at, *numbers])
        if rng.random() < 0.03 * bool(wrong):
            numbers = [0] * rng.choice([1024, 4096, 4097])
            steps[-1] = ["run", at, 0, len(numbers)]
        length = 4 * len(numbers)
        fields = [at, length, 0]
        if length > 8 and rng.random() < 0.15:
            cut = rng.choice([2, 4, 8])
            fields = [at, cut, 0, at + cut, length - cut, 0]
        if role == "inflate" and rng.random() < 0.85:
            room = (len(numbers) + 7) // 8 + rng.choice([0, 0, 0, 1, -1, 8])
            where = ANSWERS_AT + rng.choice([0, 0, 1, 5, PAGE - 1])
            if rng.random() < wrong / 4:
                # In a page that this request or one before it has given away.
                where = self._page() * PAGE + rng.randrange(PAGE)
            if self._meeting and rng.random() < 0.4:
                # In a page that the request before it, of the same notification, has given away.
                where = rng.choice(self._named) * PAGE + rng.choice([1, PAGE // 2])
            steps.append(["put", where - 1, 16, rng.choice([0, (1 << 128) - 1, rng.getrandbits(128)])])
            fields += [where, max(room, 0), WRITE]
        self._named = numbers
        return steps, fields

    def _break(self, fields: list[int], wrong: float) -> list[int]:
        rng = self._random
        for at in range(len(fields)):
            if rng.random() >= wrong / 4:
                continue
            if at % 3 == 0:
                fields[at] = self._address(fields[at])
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
            self._address(0),
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

    # ------------------------------------------------------------------ values

    def _page(self) -> int:
        """Return a page that is for requests: not one of rings, arrays or answers."""
        rng = self._random
        if self._recent and rng.random() < 0.5:
            # Requests must meet: the same eight pages again, or others of them.
            return rng.choice(self._recent) + rng.randrange(8)
        first, count = rng.choice([(0, 40), (0, 40), (96, 40), (256, 8), (1 << 28, 8)])
        page = first + rng.randrange(count)
        self._recent = [page - page % 8, *self._recent[:2]]
        return page

    def _address(self, near: int) -> int:
        rng = self._random
        kind = rng.random()
        if kind < 0.4:
            return max(near + rng.choice([-PAGE, -2048, -1, 1, 2, 4, 16, 2048, PAGE]), 0)
        if kind < 0.7:
            first, _, count = rng.choice(REGIONS)
            edge = rng.choice([first, first + count]) * PAGE
            return max(edge + rng.choice([-PAGE, -16, -1, 0, 1, PAGE]), 0)
        if kind < 0.85:
            return rng.choice([0, TOP - 1, TOP - PAGE, TOP - 16, 1 << 63, (1 << 63) - PAGE, 1 << 32, 1 << 52])
        return (RINGS_AT + rng.randrange(6)) * PAGE + rng.choice([0, 16, 1024, 2048, 2052, PAGE - 4])

    def _some_bits(self, chance: float) -> int:
        return sum(1 << bit for bit in range(40) if self._random.random() < chance)
