# SPDX-License-Identifier: GPL-2.0-only
"""What a hostile guest's requests name, and over how many descriptors their bytes are spread.

A request is steps that write its bytes, and the fields of its descriptors: address, length and flags
of each. However it is cut, it is a request that the specification allows; what is broken about it
comes later (`device_moves`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hostzero.check.recording import Step
from hostzero.check.wire.device_model import INFLATE, PAGE
from hostzero.check.wire.device_places import ANSWERS_AT, ARRAYS_AT, Places
from hostzero.check.wire.device_steps import RINGS_AT
from hostzero.check.wire.wire_rings import WRITE

_ODD_PAGES = (0, 95, 96, 143, 144, 255, 272, (1 << 32) - 1, 48, 56, 64)


class Requests:
    """Draws requests from one random source.

    Attributes:
        named: the pages that the last request names.
        meeting: requests of one notification are drawn; what they name and where they put it may meet.
    """

    def __init__(self, rng: random.Random, places: Places) -> None:
        """Draw from `rng`, and pages from `places`."""
        self._random = rng
        self._places = places
        self.named: list[int] = [0]
        self.meeting = False

    def pfn_request(self, wrong: float, role: str, room: int) -> tuple[list[Step], list[int]]:
        """Return a request of page numbers, in at most `room` descriptors."""
        rng = self._random
        numbers = self._numbers()
        for n in range(len(numbers)):
            if rng.random() < wrong / 6:
                numbers[n] = rng.choice([*_ODD_PAGES, self._places.page()])
        pages = sorted({number - number % 8 for number in numbers if role == INFLATE})[:6]
        steps: list[Step] = [["dirty", page, 8] for page in pages]
        answer = role == INFLATE and rng.random() < 0.85
        if rng.random() < 0.03 * bool(wrong):
            numbers = [0] * rng.choice([1024, 4096, 4097])
            fields = [ARRAYS_AT, 4 * len(numbers), 0]
            steps.append(["run", ARRAYS_AT, 0, len(numbers)])
        else:
            written, fields = self._array(numbers, max(room - answer, 1))
            steps += written
        if answer:
            size = max((len(numbers) + 7) // 8 + rng.choice([0, 0, 0, 1, -1, 8]), 0)
            written, more = self._bitmap(size, numbers, wrong, max(room - len(fields) // 3, 1))
            steps += written
            fields += more
        self.named = numbers
        return steps, fields

    def pages_request(self, wrong: float, room: int) -> tuple[list[Step], list[int]]:
        """Return a request that hands over pages themselves, in at most `room` descriptors."""
        rng = self._random
        steps: list[Step] = []
        fields: list[int] = []
        named: list[int] = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            page = self._places.page()
            count = rng.choice([1, 1, 2, 3, 4, 8, 8, 24])
            page = self._places.piece(page) if count == 8 else page
            if rng.random() < wrong / 3:
                # Pages that hold a ring or a buffer: given away, and in use.
                start = rng.choice([ARRAYS_AT, ANSWERS_AT, RINGS_AT * PAGE])
                page = max(start // PAGE + rng.randrange(-2, 6) * (count < 8), 0)
            else:
                steps.append(["dirty", page, count])
            named += range(page, page + count)
            unit = rng.choice([PAGE, PAGE, PAGE, 2048, 1])
            for start, length in self._cut(count * PAGE, unit, room - len(fields) // 3):
                fields += [page * PAGE + start, length, WRITE]
        self.named = named
        return steps, fields

    def put(self, gpa: int, data: bytes) -> list[Step]:
        """Return the steps that write bytes."""
        return [
            ["put", gpa + at, len(data[at : at + 64]), int.from_bytes(data[at : at + 64], "little")]
            for at in range(0, len(data), 64)
        ]

    def _numbers(self) -> list[int]:
        # Pages in runs, with gaps and twice, in any order.
        rng = self._random
        first = self._places.page()
        if rng.random() < 0.25:
            # A host that drops eight pages in one piece sees a piece come in two requests.
            first = self._places.piece(first) + rng.choice([0, 4])
            numbers = list(range(first, first + 4))
        else:
            numbers = []
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                numbers += range(first, first + rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 24]))
                first = self._places.page()
            if rng.random() < 0.3:
                numbers = [number for number in numbers if rng.random() < 0.7] or numbers[:1]
        del numbers[26:]
        order = rng.random()
        if order < 0.35:
            numbers.sort(reverse=True)
        elif order < 0.55:
            rng.shuffle(numbers)
        elif order < 0.65:
            numbers.reverse()
        if rng.random() < 0.2:
            for _ in range(rng.choice([1, 1, 2, 4])):
                numbers.insert(rng.randrange(len(numbers) + 1), rng.choice(numbers))
        return numbers

    def _array(self, numbers: Sequence[int], room: int) -> tuple[list[Step], list[int]]:
        rng = self._random
        data = b"".join((number & 0xFFFF_FFFF).to_bytes(4, "little") for number in numbers)
        at = ARRAYS_AT + rng.choice([0, 0, 4, PAGE - 4, PAGE - 2])
        if rng.random() < 0.6:
            return [["pfns", at, *numbers]], [at, len(data), 0]
        steps: list[Step] = []
        fields: list[int] = []
        pieces = self._cut(len(data), rng.choice([1, 4]), room)
        order = list(range(len(pieces)))
        if rng.random() < 0.6:
            # Not one behind the other.
            rng.shuffle(order)
        places = [0] * len(pieces)
        for piece in order:
            at += rng.choice([0, 1, 4, PAGE // 2])
            places[piece] = at
            at += pieces[piece][1]
        for (start, length), place in zip(pieces, places, strict=True):
            steps += self.put(place, data[start : start + length])
            fields += [place if length else self._places.address(place), length, 0]
        return steps, fields

    def _bitmap(
        self, size: int, numbers: Sequence[int], wrong: float, room: int
    ) -> tuple[list[Step], list[int]]:
        rng = self._random
        steps: list[Step] = []
        fields: list[int] = []
        spots = [ANSWERS_AT + page * PAGE for page in range(8)]
        rng.shuffle(spots)
        pieces = self._cut(size, 1, room) if rng.random() < 0.4 else [(0, size)]
        for _, length in pieces:
            at = spots.pop() + rng.choice([1, 1, 2, 5, PAGE - 1]) if spots else ANSWERS_AT + 64
            if rng.random() < wrong / 2:
                # In a page that this request, or one before it, has given away, at an edge above all.
                page = rng.choice([self._places.page(), min(numbers), max(numbers), *numbers])
                at = page * PAGE + rng.choice([0, 1, PAGE // 2, PAGE - 1, -1])
            if self.meeting and rng.random() < 0.4:
                # In a page that the request before it, of the same notification, has given away.
                at = rng.choice(self.named) * PAGE + rng.choice([0, 1, PAGE // 2, -1])
            at = max(at, 0)
            if fields and rng.random() < wrong / 4:
                # In what the piece before it has.
                at = fields[-3] + rng.choice([0, 1])
            noise = rng.choice([0, (1 << 128) - 1, rng.getrandbits(128)])
            steps.append(["put", max(at - 1, 0), 16, noise])
            fields += [at if length else self._places.address(at), length, WRITE]
        return steps, fields

    def _cut(self, length: int, unit: int, room: int) -> list[tuple[int, int]]:
        # At most `room` pieces, each (first byte, length), at multiples of `unit`, some of them empty.
        rng = self._random
        count = min(max(room, 1), rng.choice([1, 1, 2, 3, 4]) if unit > 1 else rng.choice([2, 2, 3, 4, 6]))
        ends = sorted(rng.randrange(length // unit + 1) * unit for _ in range(count - 1))
        return [(start, end - start) for start, end in zip([0, *ends], [*ends, length], strict=True)]
