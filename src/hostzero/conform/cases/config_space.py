# SPDX-License-Identifier: GPL-2.0-only
"""The configuration space: 16 bytes, two of whose fields are the driver's."""

from __future__ import annotations

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.conform.target import Ability
from hostzero.errors import DeviceError
from hostzero.virtio.balloon import CONFIG, CONFIG_FREE_PAGE_HINT_CMD_ID, CONFIG_NUM_PAGES, BalloonConfig
from hostzero.virtio.features import Feature

SET_TARGET = (Ability.SET_TARGET,)


@case("config-readable-early", "It can be read before FEATURES_OK", "2.5.2")
def readable_early(rig: Rig) -> None:
    rig.offered()
    data = rig.transport.read_config(0, CONFIG.size)
    rig.judge.must(len(data) == CONFIG.size, f"{len(data)} bytes were read, not {CONFIG.size}")


@case("config-parts", "Any part of it reads as it does in the whole", "2.5")
def parts(rig: Rig) -> None:
    rig.start()
    rig.write_actual(0x0403_0201)
    whole = rig.transport.read_config(0, CONFIG.size)
    for offset in range(0, CONFIG.size, 4):
        part = rig.transport.read_config(offset, 4)
        rig.judge.must(
            part == whole[offset : offset + 4],
            f"4 bytes at {offset} read {part.hex()}, in the whole {whole[offset : offset + 4].hex()}",
        )


@case("config-actual", "`actual` reads as the driver wrote it", "5.5.6.1")
def actual(rig: Rig) -> None:
    rig.start()
    for pages in (1, 0x0001_0203, 0):
        rig.write_actual(pages)
        seen = rig.config().actual
        rig.judge.must(seen == pages, f"`actual` was written as {pages:#x} and reads {seen:#x}")


@case("config-actual-any-value", "A driver may write nonsense into `actual`", "5.5.4")
def actual_any_value(rig: Rig) -> None:
    rig.start()
    for pages in (0xFFFF_FFFF, 0x8000_0000, len(rig.ram.data) >> 11):
        rig.write_actual(pages)
        rig.judge.safe(rig.connection.alive(), "the device went away")
    rig.write_actual(0)
    rig.expect_works()


@case("config-num-pages-read-only", "The driver cannot change `num_pages`", "5.5.4")
def num_pages_read_only(rig: Rig) -> None:
    rig.start()
    before = rig.config().num_pages
    rig.judge.transcript.sent("write num_pages")
    _write(rig, CONFIG_NUM_PAGES, (before + 0x1234).to_bytes(4, "little"))
    seen = rig.config().num_pages
    rig.judge.should(seen == before, f"num_pages was {before} and reads {seen} after the driver wrote to it")


@case(
    "config-cmd-id-read-only",
    "The driver cannot change the command id of hinting",
    "5.5.4",
    offers=Feature.FREE_PAGE_HINT,
)
def cmd_id_read_only(rig: Rig) -> None:
    rig.start()
    before = rig.config().free_page_hint_cmd_id
    rig.judge.transcript.sent("write free_page_hint_cmd_id")
    _write(rig, CONFIG_FREE_PAGE_HINT_CMD_ID, 0x7777_7777.to_bytes(4, "little"))
    seen = rig.config().free_page_hint_cmd_id
    rig.judge.must(
        seen == before, f"the command id was {before:#x} and reads {seen:#x} after the driver wrote to it"
    )


@case(
    "config-stale-write",
    "A write of the whole space with an old target changes `actual` only",
    "5.5.4",
    needs=SET_TARGET,
)
def stale_write(rig: Rig) -> None:
    rig.start()
    rig.connection.set_target(100)
    rig.settle(lambda: rig.config().num_pages == 100)
    stale = rig.config()._replace(actual=40)
    rig.judge.transcript.sent("the host asks for 200 pages")
    rig.connection.set_target(200)
    rig.settle(lambda: rig.config().num_pages == 200)
    rig.judge.transcript.sent("write the whole space, with num_pages 100 and actual 40")
    _write(rig, 0, stale.pack())
    seen = rig.config()
    rig.judge.must(seen.actual == 40, f"`actual` reads {seen.actual}, not 40")
    rig.judge.should(
        seen.num_pages == 200, f"num_pages reads {seen.num_pages}: the write of the driver undid the host's"
    )
    rig.connection.set_target(0)


@case(
    "config-target",
    "The host's target is `num_pages`, in pages of 4 KiB, little endian",
    "5.5.4",
    needs=SET_TARGET,
)
def target(rig: Rig) -> None:
    rig.start()
    for pages in (0x0201, 0x0003, 0):
        rig.judge.transcript.sent(f"the host asks for {pages} pages")
        rig.connection.set_target(pages)
        rig.judge.must(
            rig.settle(lambda pages=pages: rig.config().num_pages == pages),  # type: ignore[misc]
            f"num_pages reads {rig.config().num_pages}, not {pages}",
        )


@case(
    "config-change-notified",
    "A new target is notified",
    "5.5.6",
    needs=(Ability.SET_TARGET, Ability.CONFIG_CHANGES),
)
def change_notified(rig: Rig) -> None:
    rig.start()
    before = rig.config_changes
    rig.judge.transcript.sent("the host asks for 64 pages")
    rig.connection.set_target(64)
    rig.judge.must(
        rig.settle(lambda: rig.config_changes > before), "no configuration change notification came"
    )
    rig.connection.set_target(0)


@case(
    "config-target-before-driver",
    "A target from before the driver is there to be read",
    "5.5.6",
    needs=SET_TARGET,
)
def target_before_driver(rig: Rig) -> None:
    rig.judge.transcript.sent("the host asks for 77 pages, before the driver starts")
    rig.connection.set_target(77)
    rig.start()
    rig.judge.must(
        rig.settle(lambda: rig.config().num_pages == 77), f"num_pages reads {rig.config().num_pages}, not 77"
    )
    rig.connection.set_target(0)


@case(
    "config-target-survives-reset",
    "A reset of the driver does not change the host's target",
    "5.5.4",
    needs=(Ability.SET_TARGET, Ability.RESET),
)
def target_survives_reset(rig: Rig) -> None:
    rig.start()
    rig.connection.set_target(55)
    rig.settle(lambda: rig.config().num_pages == 55)
    rig.reset()
    rig.start()
    seen = rig.config().num_pages
    rig.judge.should(seen == 55, f"num_pages reads {seen} after a reset; the host had asked for 55")
    rig.connection.set_target(0)


@case("config-beyond-its-end", "A read behind its end is survived", "2.5")
def beyond_its_end(rig: Rig) -> None:
    rig.start()
    rig.judge.transcript.sent("read 4 bytes at 16, and write them")
    for attempt in (
        lambda: rig.transport.read_config(CONFIG.size, 4),
        lambda: _write(rig, CONFIG.size, b"\1\2\3\4"),
    ):
        try:
            attempt()
        except DeviceError as error:
            rig.judge.transcript.came(f"refused: {error}")
    rig.judge.safe(rig.connection.alive(), "the device went away")
    rig.judge.must(
        BalloonConfig.unpack(rig.transport.read_config(0, 16)).actual == 0, "the write changed `actual`"
    )
    rig.expect_works()


def _write(rig: Rig, offset: int, data: bytes) -> None:
    try:
        rig.transport.write_config(offset, data)
    except DeviceError as error:
        rig.judge.transcript.came(f"refused: {error}")
