# SPDX-License-Identifier: GPL-2.0-only
"""What a case holds in its hands: a fresh device, guest memory, rings, and somebody who judges.

A case starts the device with `start`, sends requests, and says what it expects. Everything that
every case expects is here: that each request comes back, once, in time; that a used length is
no more than was written; that nothing changes in memory that the driver did not give away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hostzero.conform.bringup import ANSWER_SECONDS, QUIET_SECONDS, Bringup
from hostzero.conform.rings import RawRing, Segments
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.virtio.balloon import (
    CONFIG,
    CONFIG_ACTUAL,
    BalloonConfig,
    bitmap_bytes,
    bitmap_test_le,
    pack_pfns,
)
from hostzero.virtio.features import Feature, QueueRole


class Answer(NamedTuple):
    """What came back for an inflate request.

    Attributes:
        used_len: as the device wrote it.
        bitmap: the bytes of the bitmap buffer afterwards.
        claimed: for each PFN of the request, whether the device says that it is zero.
    """

    used_len: int
    bitmap: bytes
    claimed: tuple[bool, ...]


class Rig(Bringup):
    """One case's device and driver, with requests."""

    _stopped = False

    # ------------------------------------------------------------------ requests

    def submit(
        self, role: QueueRole, requests: Sequence[tuple[Segments, Segments]], *, wait: bool = True
    ) -> list[int]:
        """Send requests with one notification; return their used lengths, or numbers if not waited for.

        Raises:
            Failed: one of them does not come back.
        """
        ring = self.rings[role]
        numbers = [ring.add(readable, writable) for readable, writable in requests]
        ring.kick()
        if not wait:
            return numbers
        return self.wait_for(role, numbers)

    def wait_for(self, role: QueueRole, numbers: Sequence[int]) -> list[int]:
        """Return the used lengths of requests, having waited for all of them.

        Raises:
            Failed: one of them does not come back.
        """
        ring = self.rings[role]
        back = self.connection.settle(
            lambda: all(number in ring.collect() for number in numbers), ANSWER_SECONDS
        )
        if not back:
            missing = sum(number not in ring.collect() for number in numbers)
            self.judge.fail(
                f"{missing} of {len(numbers)} requests on the {role.value} queue did not come back "
                f"within {ANSWER_SECONDS:g} s; {self.state()}",
                "5.5.6.7" if role is QueueRole.REPORTING else "5.5.6",
            )
        return [ring.take(number) for number in numbers]

    def send(self, role: QueueRole, readable: Segments, writable: Segments = ()) -> int:
        """Send one request and return its used length.

        Raises:
            Failed: it does not come back, or the length is more than its writable bytes.
        """
        (used_len,) = self.submit(role, [(readable, writable)])
        self.judge.transcript.came(f"{role.value}: used length {used_len}")
        self.within(used_len, sum(length for _, length in writable))
        return used_len

    def provoke(self, role: QueueRole, readable: Segments, writable: Segments = ()) -> int | None:
        """Send a request that breaks a rule of the driver's; return its used length.

        None if the device stopped for it and says so (DEVICE_NEEDS_RESET), or does not answer at
        all, which is noted. `expect_recovered` comes afterwards.

        Raises:
            Failed: the device went away, or the length is more than the writable bytes.
        """
        ring = self.rings[role]
        (number,) = self.submit(role, [(readable, writable)], wait=False)
        self.settle(lambda: number in ring.collect() or self.needs_reset())
        self.judge.safe(self.connection.alive(), "the device went away")
        if number in ring.collect():
            used_len = ring.take(number)
            self.judge.transcript.came(f"{role.value}: used length {used_len}")
            self.within(used_len, sum(length for _, length in writable))
            return used_len
        if not self.needs_reset():
            self.expect_no_stall(1, 1)
        self._stopped = True
        return None

    def expect_no_stall(self, missing: int, heads: int) -> None:
        """Note that requests neither came back nor stopped the device in the open."""
        self.judge.should(
            False,
            f"{missing} of {heads} requests were neither returned nor is DEVICE_NEEDS_RESET set: "
            "a driver waits for ever",
            "2.1.2",
        )

    def expect_recovered(self) -> None:
        """Expect the device to work, after a reset if it has stopped, and memory to be untouched.

        Raises:
            Failed: it does not.
        """
        self.expect_untouched()
        if self._stopped or self.needs_reset():
            self._stopped = False
            self.renew()
            self.start()
        self.expect_works()

    def within(self, used_len: int, writable: int) -> None:
        """Expect a used length of no more than was there to be written.

        Raises:
            Failed: it is more.
        """
        self.judge.must(
            used_len <= writable,
            f"the used length is {used_len}, and the buffer had {writable} writable bytes",
            "2.7.8.2",
        )

    def write_pfns(self, pfns: Sequence[int]) -> tuple[int, int]:
        """Write a PFN array into a buffer of its own and return its segment."""
        data = pack_pfns(pfns)
        at = self.ram.control(len(data))
        self.ram.write(at, data)
        return at, len(data)

    def inflate(
        self,
        pfns: Sequence[int],
        *,
        arrays: Segments | None = None,
        bitmap: Segments | None = None,
        ones: bool = True,
    ) -> Answer:
        """Inflate, and expect every claim to be true.

        Args:
            pfns: what the request names.
            arrays: where the PFN array lies; default: in a buffer of its own.
            bitmap: where the bitmap goes; default: a buffer of the right length with bit 7, else none.
            ones: fill the bitmap buffer with ones first, since it may hold anything.

        Raises:
            Failed: no answer, or a claim about a page that does not read as zero.
        """
        arrays = [self.write_pfns(pfns)] if arrays is None else arrays
        if bitmap is None:
            asks = Feature.DEVICE_INIT_ON_INFLATE in self.accepted
            bitmap = [(self.ram.control(bitmap_bytes(len(pfns))), bitmap_bytes(len(pfns)))] if asks else []
        for gpa, length in bitmap:
            self.ram.write(gpa, (b"\xff" if ones else b"\0") * length)
        self.ram.may_change(pfns)
        self.judge.transcript.sent(
            f"inflate {_some(pfns)} at {_places(arrays)}, bitmap {_places(bitmap) or 'none'}"
        )
        used_len = self.send(QueueRole.INFLATE, arrays, bitmap)
        data = b"".join(self.ram.read(gpa, length) for gpa, length in bitmap)
        if bitmap:
            self.judge.transcript.came(f"bitmap {data[:40].hex()}{'...' if len(data) > 40 else ''}")
        answer = Answer(used_len, data, self.claims(pfns, used_len, data))
        self.expect_true(pfns, answer)
        return answer

    def claims(self, pfns: Sequence[int], used_len: int, bitmap: bytes) -> tuple[bool, ...]:
        """Return which pages a driver would believe to be zero: bits below the used length."""
        if Feature.DEVICE_INIT_ON_INFLATE not in self.accepted:
            return (False,) * len(pfns)
        bits = min(used_len, len(bitmap)) * 8
        return tuple(n < bits and bitmap_test_le(bitmap, n) for n in range(len(pfns)))

    def expect_true(self, pfns: Sequence[int], answer: Answer) -> None:
        """Expect each claimed page to read as zero.

        Raises:
            Failed: one does not, or is no RAM at all.
        """
        for position, (pfn, claimed) in enumerate(zip(pfns, answer.claimed, strict=True)):
            if claimed:
                gpa = pfn << PAGE_SHIFT
                is_ram = self.ram.memory.contains(Gpa(gpa), PAGE_SIZE)
                self.judge.must(
                    is_ram and self.ram.is_zero(gpa, PAGE_SIZE),
                    f"bit {position} says that page {pfn:#x} is zero, and "
                    + ("it holds other bytes" if is_ram else "there is no RAM"),
                    "proposal bit 7",
                )

    def deflate(self, pfns: Sequence[int]) -> int:
        """Deflate and return the used length."""
        self.judge.transcript.sent(f"deflate {_some(pfns)}")
        return self.send(QueueRole.DEFLATE, [self.write_pfns(pfns)])

    def report(self, *segments: tuple[int, int], may_change: bool = True) -> int:
        """Report (address, length) ranges as one buffer, and expect the used length to be true.

        A used length says that so many bytes were written from the start of the buffer (2.7.8.2);
        for a reported buffer the driver takes that as zeros with bit 6.

        Raises:
            Failed: no answer, or bytes below the used length that do not read as zero.
        """
        if may_change:
            for gpa, length in segments:
                self.ram.may_change(whole_pages(gpa, length))
        self.judge.transcript.sent(f"report {_places(segments)}")
        used_len = self.send(QueueRole.REPORTING, (), segments)
        self.expect_zero_prefix(segments, used_len)
        return used_len

    def expect_zero_prefix(self, segments: Segments, used_len: int) -> None:
        """Expect the first `used_len` bytes of a reported buffer to read as zero.

        Raises:
            Failed: they do not.
        """
        left = used_len
        for gpa, length in segments:
            part = min(left, length)
            if part and self.ram.memory.contains(Gpa(gpa), part):
                self.judge.must(
                    self.ram.is_zero(gpa, part),
                    f"the used length {used_len} covers {part:#x} bytes at {gpa:#x}, which are not all zero",
                    "proposal bit 6" if Feature.DEVICE_INIT_REPORTED in self.accepted else "2.7.8.2",
                )
            elif part:
                self.judge.fail(f"the used length {used_len} covers {gpa:#x}, where there is no RAM")
            left -= part

    # ------------------------------------------------------------------ configuration

    def config(self) -> BalloonConfig:
        """Return the configuration space as the driver reads it."""
        return BalloonConfig.unpack(self.transport.read_config(0, CONFIG.size))

    def write_actual(self, pages: int) -> None:
        """Write `actual`."""
        self.judge.transcript.sent(f"actual = {pages:#x}")
        self.transport.write_config(CONFIG_ACTUAL, pages.to_bytes(4, "little"))

    # ------------------------------------------------------------------ afterwards

    def expect_untouched(self) -> None:
        """Expect every data page that was not given away to hold its bytes.

        Raises:
            Failed: one was changed.
        """
        if changed := self.ram.changed():
            gpa = changed[0]
            self.judge.safe(
                False,
                f"the device changed guest memory at {gpa:#x} (page {gpa >> PAGE_SHIFT:#x}), "
                "which no request named",
            )

    def expect_works(self) -> None:
        """Expect a started device to serve an inflate and a deflate.

        Raises:
            Failed: it does not.
        """
        page = self.ram.pages(1)
        self.inflate([page])
        self.deflate([page])

    def expect_recovery(self, rings: Sequence[RawRing], heads: int | None = None) -> None:
        """Expect that a hostile request was survived, and that a reset brings the device back.

        Either the request comes back, or the device stops and says so (DEVICE_NEEDS_RESET). What
        came back must be what was sent, each head once, and with no more than was written.

        Args:
            rings: the rings that were written by hand.
            heads: the requests that a device may return; None if any number may come.

        Raises:
            Failed: the device is gone, returns nonsense, or does not work after a reset.
        """

        def ended() -> bool:
            back = sum(len(ring.look()) for ring in rings)
            return self.needs_reset() or any(ring.overrun for ring in rings) or back == (heads or -1)

        answered = self.settle(ended, ANSWER_SECONDS if heads else QUIET_SECONDS)
        self.judge.safe(self.connection.alive(), "the device went away")
        for ring in rings:
            back = ring.look()
            shown = f"{back[:8]}{'...' if len(back) > 8 else ''}" if back else "none"
            self.judge.transcript.came(f"{ring.role.value}: {len(back)} used entries {shown}")
            self.judge.must(
                not ring.overrun,
                f"the used index of the {ring.role.value} queue went past the available index",
                "2.7.8",
            )
        returned = sum(len(ring.returned) for ring in rings)
        if heads is not None:
            self.judge.must(
                returned <= heads, f"{returned} used entries came back for {heads} requests", "2.7.8"
            )
            if not answered:
                self.expect_no_stall(heads - returned, heads)
        self.expect_untouched()
        self.renew()
        self.start()
        self.expect_works()


def whole_pages(gpa: int, length: int) -> range:
    """Return the PFNs of the pages that lie whole in a range."""
    return range(gpa + PAGE_SIZE - 1 >> PAGE_SHIFT, gpa + length >> PAGE_SHIFT)


def _some(pfns: Sequence[int]) -> str:
    shown = ", ".join(f"{pfn:#x}" for pfn in pfns[:6])
    return f"{len(pfns)} PFNs [{shown}{', ...' if len(pfns) > 6 else ''}]"


def _places(segments: Segments) -> str:
    return ", ".join(f"{length} bytes at {gpa:#x}" for gpa, length in segments)
