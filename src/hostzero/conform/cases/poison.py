# SPDX-License-Identifier: GPL-2.0-only
"""Page poison: what the guest fills free pages with, and what that forbids."""

from __future__ import annotations

from hostzero.conform.bringup import USUAL
from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.units import PAGE_SIZE
from hostzero.virtio.balloon import CONFIG_POISON_VAL, bitmap_bytes
from hostzero.virtio.features import Feature, QueueRole

POISON = Feature.PAGE_POISON
VALUE = 0xAAAA_AAAA
PAGES = 8


@case("poison-value", "poison_val reads as the driver wrote it", "5.5.6.6", offers=POISON)
def value(rig: Rig) -> None:
    start(rig, 0x1234_5678)
    seen = rig.config().poison_val
    rig.judge.must(seen == 0x1234_5678, f"poison_val was written as 0x12345678 and reads {seen:#x}")


@case("poison-value-reset", "A reset takes the poison value back", "2.4", offers=POISON)
def value_reset(rig: Rig) -> None:
    start(rig, VALUE)
    rig.renew()
    rig.start(rig.offered() & (USUAL | POISON))
    seen = rig.config().poison_val
    rig.judge.should(seen == 0, f"poison_val reads {seen:#x}, the value of the driver before the reset")


@case("poison-value-not-negotiated", "poison_val is not there without the feature", "5.5.4", offers=POISON)
def value_not_negotiated(rig: Rig) -> None:
    rig.start()
    rig.transport.write_config(CONFIG_POISON_VAL, VALUE.to_bytes(4, "little"))
    count = max(PAGES, rig.ram.host_page)
    page = rig.ram.pages(count, count)
    if Feature.REPORTING in rig.accepted and Feature.DEVICE_INIT_REPORTED in rig.accepted:
        used_len = rig.report((page * PAGE_SIZE, count * PAGE_SIZE))
        rig.judge.should(
            used_len == count * PAGE_SIZE,
            f"poison_val was written without PAGE_POISON, and now a report is answered with {used_len}",
        )
    else:
        rig.inflate(range(page, page + count))
    rig.expect_works()


@case(
    "poison-report-keeps-value",
    "A reported page holds its poison afterwards",
    "5.5.6.7.2",
    offers=POISON | Feature.REPORTING,
    lessons=(6, 10),
)
def report_keeps_value(rig: Rig) -> None:
    start(rig, VALUE)
    page = rig.ram.pages(PAGES)
    rig.ram.fill(page, PAGES, VALUE & 0xFF)
    _report(rig, page)
    rig.judge.must(
        all(rig.ram.is_kept(page + n) for n in range(PAGES)),
        "a reported page, full of 0xaa as poison_val says, holds other bytes afterwards",
    )


@case(
    "poison-zero-is-zero",
    "With poison_val 0 a reported page reads as zero afterwards",
    "5.5.6.7.2",
    offers=POISON | Feature.REPORTING,
    lessons=(3, 6),
)
def zero_is_zero(rig: Rig) -> None:
    start(rig, 0)
    page = rig.ram.pages(PAGES)
    rig.ram.fill(page, PAGES, 0)
    _report(rig, page)
    rig.judge.must(
        all(rig.ram.is_kept(page + n) for n in range(PAGES)), "a reported page was zero and holds other bytes"
    )


@case(
    "poison-inflate",
    "With poison, inflate and deflate work as ever",
    "5.5.6",
    offers=POISON,
)
def inflate(rig: Rig) -> None:
    start(rig, VALUE)
    first = rig.ram.pages(PAGES)
    rig.ram.may_change(range(first, first + PAGES))
    at = rig.ram.control(bitmap_bytes(PAGES))
    writable = [(at, bitmap_bytes(PAGES))] if Feature.DEVICE_INIT_ON_INFLATE in rig.accepted else []
    rig.judge.transcript.sent(f"inflate {PAGES} pages from {first:#x}")
    rig.send(QueueRole.INFLATE, [rig.write_pfns(range(first, first + PAGES))], writable)
    rig.deflate(range(first, first + PAGES))
    rig.expect_untouched()


@case(
    "poison-bit6",
    "With a poison value, a claim of bit 6 is about that value or is not made",
    "proposal bit 6",
    offers=POISON | Feature.REPORTING | Feature.DEVICE_INIT_REPORTED,
    lessons=(6,),
)
def bit6(rig: Rig) -> None:
    start(rig, VALUE)
    page = rig.ram.pages(PAGES)
    # 5.5.6.7.1: a driver fills its pages before it reports them.
    rig.ram.fill(page, PAGES, VALUE & 0xFF)
    rig.ram.may_change(range(page, page + PAGES))
    used_len = _report(rig, page)
    expected = bytes([VALUE & 0xFF]) * used_len
    rig.judge.must(
        rig.ram.read(page * PAGE_SIZE, used_len) == expected,
        f"the used length is {used_len}, and the block does not hold the poison value",
    )


@case(
    "poison-bit7",
    "With a poison value, a bit of bit 7 is about that value or is not set",
    "proposal bit 7",
    offers=POISON | Feature.DEVICE_INIT_ON_INFLATE,
    lessons=(6,),
)
def bit7(rig: Rig) -> None:
    start(rig, VALUE)
    first = rig.ram.pages(PAGES)
    rig.ram.may_change(range(first, first + PAGES))
    at = rig.ram.control(1)
    rig.judge.transcript.sent(f"inflate {PAGES} pages from {first:#x} with a bitmap")
    used_len = rig.send(QueueRole.INFLATE, [rig.write_pfns(range(first, first + PAGES))], [(at, 1)])
    claimed = rig.claims(range(first, first + PAGES), used_len, rig.ram.read(at, 1))
    for n, claim in enumerate(claimed):
        rig.judge.must(
            not claim
            or rig.ram.read((first + n) * PAGE_SIZE, PAGE_SIZE) == bytes([VALUE & 0xFF]) * PAGE_SIZE,
            f"bit {n} is set, and the page does not hold the poison value",
        )


def start(rig: Rig, poison: int) -> None:
    """Start a driver that poisons its free pages."""
    rig.start(rig.offered() & (USUAL | POISON), poison=poison)


def _report(rig: Rig, page: int) -> int:
    rig.judge.transcript.sent(f"report {PAGES} pages from {page:#x}")
    return rig.send(QueueRole.REPORTING, (), [(page * PAGE_SIZE, PAGES * PAGE_SIZE)])
