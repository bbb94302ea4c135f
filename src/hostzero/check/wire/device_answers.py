# SPDX-License-Identifier: GPL-2.0-only
"""What a device answered, judged by the bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from hostzero.check.violation import Kind
from hostzero.check.wire import wire_rings
from hostzero.check.wire.device_model import (
    INFLATE,
    INIT_ON_INFLATE,
    INIT_REPORTED,
    PAGE,
    REPORT,
    DeviceModel,
    Request,
)
from hostzero.check.wire.shadow import ShadowedMemory
from hostzero.check.wire.wire_rings import SEGMENT, gather, overlap

_CLAIM = "a page that the device says is zero is not"


class Fail(Protocol):
    """Records and raises a violation."""

    def __call__(self, kind: Kind, what: str, claim: str = "", **fields: Any) -> NoReturn:
        """Say what is wrong."""


class Answers:
    """Judges used entries and changed bytes; `fail` hears what is wrong."""

    def __init__(self, model: DeviceModel, ram: ShadowedMemory, fail: Fail) -> None:
        """Look at `ram` with the eyes of `model`."""
        self._model = model
        self._ram = ram
        self._fail = fail

    def writes(self, request: Request) -> list[SEGMENT]:
        """Return the bytes that the device writes for a request once it has dropped its pages."""
        if request.role != INFLATE:
            return []
        return self._model.bitmap(request, len(self._model.pfns(request, self._ram.read_before)) or 1) or []

    def check_bytes(self, changed: NDArray[np.int64], pages: set[int], allowed: list[SEGMENT]) -> None:
        """Check that every changed word is a dropped page's or in bytes that may be written."""
        ram_pages = {at for pfn in pages if (at := self._ram.offset(pfn * PAGE, PAGE)) is not None}
        ranges = [(at, n) for start, n in allowed if (at := self._ram.offset(start, n)) is not None]
        starts = changed * 8
        dropped_words = np.isin(starts - starts % PAGE, list(ram_pages)) & (self._ram.words[changed] == 0)
        for word in changed[~dropped_words].tolist():
            byte = word * 8
            dropped = byte - byte % PAGE in ram_pages
            for place in range(byte, byte + 8):
                if self._ram.bytes[place] == self._ram.shadow[place] or (
                    dropped and not self._ram.bytes[place]
                ):
                    continue
                if not any(at <= place < at + length for at, length in ranges):
                    what = "the device changes a byte that it was not given"
                    value = int(self._ram.bytes[place])
                    self._fail("corruption", what, f"RAM {place:#x}", wrong_offset=place, wrong_value=value)

    def check(
        self, request: Request, length: int, later: list[SEGMENT], gone: Sequence[SEGMENT] = ()
    ) -> None:
        """Check the used length of a request, and what it or its bitmap claims.

        `later` are bytes that were written for requests behind it; they prove nothing of this one. What
        lay in `gone` those may have dropped, a bitmap with bits in it too.
        """
        parsed, model = request.parsed, self._model
        if parsed.bad and length:
            self._fail("corruption", "a chain that breaks a rule comes back with a used length", str(request))
        if length > parsed.writable_bytes:
            self._fail("corruption", "a used length is larger than what the device may write", str(request))
        if request.role == INFLATE:
            self._check_bitmap(request, length, later, gone)
        elif request.role == REPORT:
            if length and (not model.acked & INIT_REPORTED or model.poisoned):
                what = "a used length is claimed that the negotiated features do not allow"
                self._fail("corruption", what, str(request))
            for start, size in wire_rings.first_bytes(parsed.writable, length):
                self._check_zero(start, size, later, f"used length {length} of {request}")
            whole = length == parsed.writable_bytes
            if not whole and model.claims_all(request) and not self._ram.discard_failed:
                self._fail("lost", "a report that was dropped is not claimed to be zero", str(request))
        elif length:
            self._fail("rot", "a used length for a request into which nothing is written", str(request))

    def _check_bitmap(
        self, request: Request, length: int, later: list[SEGMENT], gone: Sequence[SEGMENT]
    ) -> None:
        model = self._model
        before, now = model.pfns(request, self._ram.read_before), model.pfns(request, self._ram.read)
        bitmap = model.bitmap(request, len(before)) or []
        room = sum(size for _, size in bitmap)
        if length > room:
            what = "an inflate's used length is larger than its bitmap may be"
            self._fail("corruption", what, f"{length} of {room}: {request}")
        if overlap(bitmap, later):
            return
        if length < room and model.acked & INIT_ON_INFLATE:
            self._fail("lost", "an inflate's bitmap is not all written", f"{length} of {room}: {request}")
        bits = gather(self._ram.read, bitmap, length)
        due = set() if overlap(bitmap, gone) else self._due(before, bitmap)
        for n in range(8 * length):
            claimed = bits[n // 8] >> n % 8 & 1
            if n >= len(before):
                if claimed:
                    self._fail("corruption", "a bit behind the last page of a request is set", str(request))
                continue
            pfn = before[n]
            # The numbers may have been dropped with the page that they were in: then the device has
            # read either.
            if claimed and not any(self._is_zero(each, later) for each in {pfn, now[n]}):
                if self._ram.offset(pfn * PAGE, PAGE) is None:
                    self._fail("corruption", "a page outside guest memory is claimed to be zero", pfn=pfn)
                self._check_zero(pfn * PAGE, PAGE, later, f"bit {n} of {request}")
            elif not claimed and before == now and pfn in due:
                self._fail("lost", "a page that was dropped is not claimed to be zero", pfn=pfn)

    def _due(self, pfns: list[int], bitmap: list[SEGMENT]) -> set[int]:
        # What this request alone must have dropped, if nothing went wrong.
        model = self._model
        if model.inhibited or self._ram.discard_failed:
            return set()
        return model.whole_pieces(pfns, set(pfns), bitmap + model.live_bytes())

    def _is_zero(self, pfn: int, later: list[SEGMENT]) -> bool:
        at = self._ram.offset(pfn * PAGE, PAGE)
        if at is None:
            return False
        return overlap([(pfn * PAGE, PAGE)], later) or not self._ram.bytes[at : at + PAGE].any()

    def _check_zero(self, start: int, length: int, later: list[SEGMENT], claim: str) -> None:
        if overlap([(start, length)], later):
            return
        at = self._ram.offset(start, length)
        assert at is not None, "a checked segment"
        wrong = np.flatnonzero(self._ram.bytes[at : at + length])
        if wrong.size:
            first = int(wrong[0])
            value = int(self._ram.bytes[at + first])
            pfn = (start + first) // PAGE
            self._fail("corruption", _CLAIM, claim, pfn=pfn, wrong_offset=first, wrong_value=value)
