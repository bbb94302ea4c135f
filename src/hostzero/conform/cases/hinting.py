# SPDX-License-Identifier: GPL-2.0-only
"""Free page hinting: command ids, rounds, and pages that are still the guest's."""

from __future__ import annotations

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.conform.target import Ability
from hostzero.units import PAGE_SHIFT, PAGE_SIZE
from hostzero.virtio.balloon import CMD_ID_DONE, CMD_ID_STOP
from hostzero.virtio.features import Feature, QueueRole

HINT = Feature.FREE_PAGE_HINT
HOST = (Ability.HINT,)


@case("hint-idle", "Without a run the command id is a reserved one", "5.5.6.5.2", offers=HINT)
def idle(rig: Rig) -> None:
    rig.start()
    cmd_id = rig.config().free_page_hint_cmd_id
    rig.judge.should(
        cmd_id in {CMD_ID_STOP, CMD_ID_DONE},
        f"the command id reads {cmd_id:#x}, and nobody has asked for hints",
    )


@case(
    "hint-start",
    "A run has a command id of 2 or more, and the driver is told",
    "5.5.6.5",
    offers=HINT,
    needs=HOST,
)
def start(rig: Rig) -> None:
    rig.start()
    before = rig.config_changes
    begin(rig)
    if rig.can(Ability.CONFIG_CHANGES):
        rig.judge.must(
            rig.settle(lambda: rig.config_changes > before),
            "no configuration change notification came",
            "5.5.6.5",
        )


@case(
    "hint-round",
    "A whole round: the id, pages, STOP; each buffer comes back",
    "5.5.6.5",
    offers=HINT,
    needs=HOST,
)
def whole_round(rig: Rig) -> None:
    rig.start()
    send_id(rig, begin(rig))
    first = rig.ram.pages(64)
    for at in range(0, 64, 8):
        hint(rig, first + at, 8)
    send_id(rig, CMD_ID_STOP)
    rig.connection.hint_stop()
    rig.connection.hint_done()
    expect_id(rig, CMD_ID_DONE)
    rig.expect_untouched()


@case("hint-stop", "A stopped run shows STOP", "5.5.6.5", offers=HINT, needs=HOST)
def stop(rig: Rig) -> None:
    rig.start()
    send_id(rig, begin(rig))
    rig.judge.transcript.sent("the host stops the run")
    rig.connection.hint_stop()
    expect_id(rig, CMD_ID_STOP)


@case("hint-done", "A finished run shows DONE", "5.5.6.5.2", offers=HINT, needs=HOST)
def done(rig: Rig) -> None:
    rig.start()
    send_id(rig, begin(rig))
    send_id(rig, CMD_ID_STOP)
    rig.connection.hint_stop()
    rig.judge.transcript.sent("the host ends the run")
    rig.connection.hint_done()
    expect_id(rig, CMD_ID_DONE)


@case(
    "hint-id-not-reused",
    "An id is not used again before the driver has sent STOP",
    "5.5.6.5.2",
    offers=HINT,
    needs=HOST,
)
def id_not_reused(rig: Rig) -> None:
    rig.start()
    seen = []
    for _ in range(3):
        seen.append(begin(rig))
        send_id(rig, seen[-1])
        rig.connection.hint_stop()
        expect_id(rig, CMD_ID_STOP)
    rig.judge.must(
        len(set(seen)) == len(seen), f"the ids were {[hex(cmd_id) for cmd_id in seen]}, without a STOP"
    )


@case("hint-without-run", "Pages without a run are ignored", "5.5.6.5.2", offers=HINT)
def without_run(rig: Rig) -> None:
    rig.start()
    hint(rig, rig.ram.pages(8), 8)
    rig.quiet()
    rig.expect_untouched()


@case(
    "hint-wrong-id",
    "Pages under another id than that of the run are ignored",
    "5.5.6.5.2",
    offers=HINT,
    needs=HOST,
)
def wrong_id(rig: Rig) -> None:
    rig.start()
    cmd_id = begin(rig)
    send_id(rig, cmd_id + 7 & 0xFFFF_FFFF)
    hint(rig, rig.ram.pages(8), 8)
    rig.quiet()
    rig.expect_untouched()


@case(
    "hint-rewritten-page",
    "A hinted page that the guest has written since the run began keeps its bytes",
    "5.5.6.5.2",
    offers=HINT,
    needs=HOST,
)
def rewritten_page(rig: Rig) -> None:
    rig.start()
    cmd_id = begin(rig)
    page = rig.ram.pages(8)
    rig.judge.transcript.sent("write to the pages that are hinted next")
    rig.ram.fill(page, 8, 0x99)
    send_id(rig, cmd_id)
    hint(rig, page, 8)
    send_id(rig, CMD_ID_STOP)
    rig.quiet()
    rig.judge.must(
        all(rig.ram.is_kept(page + n) for n in range(8)),
        "a hinted page lost bytes that were written after its command id was issued",
    )


@case("hint-after-done", "After DONE hinted pages are left alone", "5.5.6.5.2", offers=HINT, needs=HOST)
def after_done(rig: Rig) -> None:
    rig.start()
    send_id(rig, begin(rig))
    page = rig.ram.pages(8)
    rig.ram.may_change(range(page, page + 8))
    hint(rig, page, 8)
    send_id(rig, CMD_ID_STOP)
    rig.connection.hint_stop()
    rig.connection.hint_done()
    expect_id(rig, CMD_ID_DONE)
    rig.judge.transcript.sent("write to the hinted pages")
    rig.ram.fill(page, 8, 0x88)
    rig.quiet()
    rig.expect_untouched()


@case(
    "hint-after-stop-buffer",
    "Pages behind the driver's STOP belong to no run",
    "5.5.6.5.2",
    offers=HINT,
    needs=HOST,
)
def after_stop_buffer(rig: Rig) -> None:
    rig.start()
    send_id(rig, begin(rig))
    send_id(rig, CMD_ID_STOP)
    hint(rig, rig.ram.pages(8), 8)
    rig.quiet()
    rig.expect_untouched()


@case(
    "hint-id-of-another-size",
    "A command id that is not 4 bytes long is survived",
    "5.5.6.5",
    offers=HINT,
    lessons=(8,),
)
def id_of_another_size(rig: Rig) -> None:
    rig.start(raw={QueueRole.FREE_PAGE})
    ring = rig.raw[QueueRole.FREE_PAGE]
    at = rig.ram.control(64)
    for head, length in enumerate((1, 3, 8, 64)):
        ring.guest.offer(ring.guest.chain([(at, length, 0)], first=head))
    rig.judge.transcript.sent("command ids of 1, 3, 8 and 64 bytes")
    ring.kick()
    rig.expect_recovery([ring], heads=4)


@case(
    "hint-used-length",
    "The used length of a hinted page claims nothing that was not written",
    "2.7.8.2",
    offers=HINT,
)
def used_length(rig: Rig) -> None:
    rig.start()
    page = rig.ram.pages(4)
    used_len = hint(rig, page, 4)
    if used_len:
        rig.judge.must(
            not any(rig.ram.is_kept(page + n) for n in range(used_len >> PAGE_SHIFT)),
            f"the used length is {used_len}, and the pages hold what they held",
        )


def begin(rig: Rig) -> int:
    """Have the host start a run and return its command id.

    Raises:
        Failed: the id does not appear, or is a reserved one.
    """
    rig.judge.transcript.sent("the host asks for free page hints")
    rig.connection.hint_start()
    reserved = {CMD_ID_STOP, CMD_ID_DONE}
    rig.judge.must(
        rig.settle(lambda: rig.config().free_page_hint_cmd_id not in reserved),
        f"the command id still reads {rig.config().free_page_hint_cmd_id}",
        "5.5.6.5",
    )
    cmd_id = rig.config().free_page_hint_cmd_id
    rig.judge.transcript.came(f"command id {cmd_id:#x}")
    return cmd_id


def send_id(rig: Rig, cmd_id: int) -> None:
    """Send a command id as the driver does."""
    at = rig.ram.control(4)
    rig.ram.write(at, cmd_id.to_bytes(4, "little"))
    rig.judge.transcript.sent(f"command id {cmd_id:#x}")
    rig.send(QueueRole.FREE_PAGE, [(at, 4)])


def hint(rig: Rig, first: int, pages: int) -> int:
    """Hint pages and return the used length."""
    rig.judge.transcript.sent(f"hint {pages} pages from {first:#x}")
    return rig.send(QueueRole.FREE_PAGE, (), [(first * PAGE_SIZE, pages * PAGE_SIZE)])


def expect_id(rig: Rig, cmd_id: int) -> None:
    """Expect the configuration space to show a command id.

    Raises:
        Failed: it shows another.
    """
    rig.judge.must(
        rig.settle(lambda: rig.config().free_page_hint_cmd_id == cmd_id),
        f"the command id reads {rig.config().free_page_hint_cmd_id:#x}, not {cmd_id}",
    )
