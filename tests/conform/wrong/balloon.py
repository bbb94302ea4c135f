# SPDX-License-Identifier: GPL-2.0-only
"""Wrong on the inflate and deflate queues, and in the bitmap of bit 7."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from hostzero.device import BalloonDevice
from hostzero.device.partial_pages import PartialPages
from hostzero.device.state import QueueHandler
from hostzero.ram import GuestMemory
from hostzero.units import PAGE_SHIFT, Gpa
from hostzero.virtio.balloon import bitmap_bytes
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import Feature, QueueRole
from tests.conform.wrong.device import Answer, Make, WrongDevice, answering, pfns_of

INFLATE, DEFLATE = QueueRole.INFLATE, QueueRole.DEFLATE
BIT_7 = Feature.DEVICE_INIT_ON_INFLATE


def keeps(role: QueueRole, when: Callable[[WrongDevice, Chain], bool]) -> Make:
    """Never returns some requests, as a device that skips one before it adds the used entry."""

    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        return None if when(device, chain) else inner.handle(chain)

    return answering(role)(answer)


def outside(device: WrongDevice, chain: Chain) -> bool:
    return any(not device.memory.contains(Gpa(pfn << PAGE_SHIFT), 1) for pfn in pfns_of(chain))


silent_inflate = keeps(INFLATE, lambda *_: True)
silent_deflate = keeps(DEFLATE, lambda *_: True)
inflates_128 = keeps(INFLATE, lambda _, chain: chain.readable_len > 512)
inflates_1024 = keeps(INFLATE, lambda _, chain: chain.readable_len > 4096)
deflates_128 = keeps(DEFLATE, lambda _, chain: chain.readable_len > 512)
no_duplicates = keeps(INFLATE, lambda _, chain: len(set(pfns_of(chain))) < len(pfns_of(chain)))
one_at_a_time = keeps(INFLATE, lambda device, _: device.metrics.inflate.requests % 2 == 0)
inflate_needs_ram = keeps(INFLATE, outside)
deflate_needs_ram = keeps(DEFLATE, outside)
inflate_below_4_gib = keeps(INFLATE, lambda _, chain: any(pfn >= 1 << 20 for pfn in pfns_of(chain)))
not_the_last_page = keeps(
    INFLATE,
    lambda device, chain: any(
        pfn + 1 == (region.gpa + region.size) >> PAGE_SHIFT
        for pfn in pfns_of(chain)
        for region in device.memory.regions
    ),
)
keeps_ragged_inflate = keeps(INFLATE, lambda _, chain: bool(chain.readable_len % 4))
keeps_ragged_deflate = keeps(DEFLATE, lambda _, chain: bool(chain.readable_len % 4))
tires_of_inflating = keeps(INFLATE, lambda device, _: device.metrics.inflate.requests > 100)
tires_of_deflating = keeps(DEFLATE, lambda device, _: device.metrics.deflate.requests > 4)
stops_at_the_wrap = keeps(DEFLATE, lambda device, _: device.metrics.deflate.requests >= 65536)
no_inflate_with_poison = keeps(INFLATE, lambda device, _: device._state.poisoned)
short_inflate_chains = keeps(INFLATE, lambda _, chain: len(chain.readable) > 8)


def twice(role: QueueRole) -> Make:
    """Never returns a request for a page that was named before."""

    def make(memory: GuestMemory) -> BalloonDevice:
        seen: set[int] = set()

        def when(_: WrongDevice, chain: Chain) -> bool:
            pfns = set(pfns_of(chain))
            again = bool(pfns & seen)
            seen.update(pfns)
            return again

        return keeps(role, when)(memory)

    return make


inflates_a_page_once = twice(INFLATE)


@answering(INFLATE)
def joins_too_far(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    used_len = inner.handle(chain)
    pfns = pfns_of(chain)
    if max(pfns) - min(pfns) < 4096:
        device.zap(min(pfns), max(pfns) - min(pfns) + 1)
    return used_len


@answering(INFLATE)
def one_descriptor(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    return inner.handle(dataclasses.replace(chain, readable=chain.readable[:1]))


@answering(INFLATE, DEFLATE)
def length_of_what_was_read(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(chain)
    return chain.readable_len


@answering(DEFLATE)
def length_of_what_could_be_written(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(chain)
    return chain.writable_len


@answering(INFLATE)
def cuts_to_32_bits(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    for pfn in pfns_of(chain):
        device.zap((pfn << PAGE_SHIFT & 0xFFFF_FFFF) >> PAGE_SHIFT)
    return inner.handle(chain)


@answering(INFLATE)
def rounds_the_array_up(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    whole = (chain.readable[0].length + 3) // 4 * 4
    return inner.handle(dataclasses.replace(chain, readable=(chain.readable[0]._replace(length=whole),)))


@answering(INFLATE)
def counts_itself(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    used_len = inner.handle(chain)
    device._state.space.actual += len(pfns_of(chain))
    return used_len


@answering(DEFLATE)
def drops_on_deflate(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    for pfn in pfns_of(chain):
        device.zap(pfn)
    return inner.handle(chain)


class Late(WrongDevice):
    """Drops what was inflated, reported or hinted some time after the answer."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.pages: set[int] = set()
        for role in (INFLATE, QueueRole.REPORTING, QueueRole.FREE_PAGE):
            self._handlers[role] = _Noting(self, self._handlers[role])

    def poll(self) -> None:
        for page in self.pages:
            self.zap(page)


class _Noting:
    def __init__(self, device: Late, inner: QueueHandler) -> None:
        self.device = device
        self.inner = inner

    def handle(self, chain: Chain) -> int | None:
        if chain.readable and not chain.writable_len > 4096:
            self.device.pages.update(pfn for pfn in pfns_of(chain) if pfn < 1 << 20)
        for gpa, length in chain.writable:
            if length >= 4096:
                self.device.pages.update(range(gpa >> PAGE_SHIFT, gpa + length >> PAGE_SHIFT))
        return self.inner.handle(chain)

    def refused(self) -> None:
        self.inner.refused()

    def stopped(self) -> None:
        self.inner.stopped()

    def reset(self) -> None:
        self.inner.reset()


class Forgets(WrongDevice):
    """Forgets between two requests which parts of a host page are in the balloon."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self._handlers[INFLATE]._remembered = PartialPages  # type: ignore[attr-defined]


# ------------------------------------------------------------------ the bitmap


def bitmap(claims: Callable[[WrongDevice, list[int], list[bool]], list[bool]]) -> Make:
    """Does the right thing and says another: gets what is zero, by position, and returns what to say."""

    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        used_len = inner.handle(chain)
        if not used_len:
            return used_len
        pfns = pfns_of(chain)
        size = bitmap_bytes(len(pfns))
        data = b"".join(device.memory.read(gpa, length) for gpa, length in chain.writable)[:size]
        mask = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
        said = claims(device, pfns, [bool(bit) for bit in mask[: len(pfns)]])
        bits = np.packbits(np.array(said, dtype=np.bool_), bitorder="little").tobytes()
        chain.write(bits[: chain.writable_len])
        return used_len

    return answering(INFLATE)(answer)


claims_all = bitmap(lambda device, pfns, zero: [True] * len(pfns))
msb_first = bitmap(
    lambda device, pfns, zero: [
        (zero + [False] * 8)[n // 8 * 8 + 7 - n % 8] for n in range(len(pfns) + -len(pfns) % 8)
    ]
)
in_order_of_value = bitmap(
    lambda device, pfns, zero: [
        bit for _, bit in sorted(zip(pfns, zero, strict=True), key=lambda each: each[0])
    ]
)
shifted_by_holes = bitmap(
    lambda device, pfns, zero: [bit for bit in zero if bit] + [False] * zero.count(False)
)
fills_the_last_byte = bitmap(lambda device, pfns, zero: zero + [True] * (-len(zero) % 8))


def _write_into(device: WrongDevice, pfns: list[int], zero: list[bool]) -> list[bool]:
    for pfn, bit in zip(pfns, zero, strict=True):
        if bit:
            device.memory.write(Gpa(pfn << PAGE_SHIFT), b"\1")
    return zero


claims_and_writes = bitmap(_write_into)


def used_length(change: Callable[[int, Chain], int]) -> Make:
    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        used_len = inner.handle(chain)
        return None if used_len is None else change(used_len, chain)

    return answering(INFLATE)(answer)


one_byte_more = used_length(lambda used_len, chain: used_len + 1)
length_of_the_buffer = used_length(lambda used_len, chain: chain.writable_len)
length_without_buffer = used_length(lambda used_len, chain: used_len or bitmap_bytes(chain.readable_len // 4))


@answering(INFLATE)
def sets_bits_only(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    before = [device.memory.read(gpa, length) for gpa, length in chain.writable]
    used_len = inner.handle(chain)
    for (gpa, length), old in zip(chain.writable, before, strict=True):
        new = device.memory.read(gpa, length)
        device.memory.write(gpa, bytes(a | b for a, b in zip(old, new, strict=True)))
    return used_len


@answering(INFLATE)
def overruns_the_bitmap(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    used_len = inner.handle(chain)
    if chain.writable:
        gpa, length = chain.writable[-1]
        device.memory.write(Gpa(gpa + length), b"\xff")
    return used_len


@answering(INFLATE)
def bitmap_without_bit_7(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    acked = device._state.acked
    device._state.acked = acked | BIT_7
    try:
        return inner.handle(chain)
    finally:
        device._state.acked = acked


@answering(INFLATE)
def first_piece_only(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    inner.handle(dataclasses.replace(chain, writable=chain.writable[:1]))
    return min(chain.writable_len, bitmap_bytes(chain.readable_len // 4))


def _naive(reread: bool) -> Answer:
    # Page by page, as a first attempt would.
    def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
        pfns = pfns_of(chain)
        for n in range(len(pfns)):
            pfn = pfns_of(chain)[n] if reread else pfns[n]
            device.zap(pfn)
        if BIT_7 not in device.acked or not chain.writable:
            return 0
        return chain.write((b"\xff" * bitmap_bytes(len(pfns)))[: chain.writable_len])

    return answer


naive = answering(INFLATE)(_naive(reread=False))
rereads_the_array = answering(INFLATE)(_naive(reread=True))


def _of_the_first() -> Make:
    def make(memory: GuestMemory) -> BalloonDevice:
        first: list[bytes] = []

        def answer(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
            used_len = inner.handle(chain)
            if used_len:
                first.append(device.memory.read(chain.writable[0].gpa, 1))
                device.memory.write(chain.writable[0].gpa, first[0])
            return used_len

        return answering(INFLATE)(answer)(memory)

    return make


one_answer_for_all = _of_the_first()


@answering(INFLATE)
def ignores_poison(device: WrongDevice, inner: QueueHandler, chain: Chain) -> int | None:
    value, device._state.space.poison_val = device._state.space.poison_val, 0
    try:
        return inner.handle(chain)
    finally:
        device._state.space.poison_val = value
