# SPDX-License-Identifier: GPL-2.0-only
"""Statistics: one buffer that the device keeps until the host asks."""

from __future__ import annotations

from collections.abc import Sequence

from hostzero.conform.case import case
from hostzero.conform.rig import Rig
from hostzero.conform.target import Ability
from hostzero.virtio.balloon import STAT_ENTRY, StatTag, pack_stats
from hostzero.virtio.features import Feature, QueueRole

STATS = Feature.STATS_VQ
REQUEST = (Ability.REQUEST_STATS,)
READ = (Ability.REQUEST_STATS, Ability.READ_STATS)
Entries = Sequence[tuple[int, int]]


@case("stats-held", "The first buffer stays with the device", "5.5.6.3", offers=STATS)
def held(rig: Rig) -> None:
    rig.start()
    number = offer(rig, _usual())
    rig.quiet()
    rig.judge.should(
        number not in rig.rings[QueueRole.STATS].collect(),
        "the first buffer came back although nobody had asked: driver and device play ping-pong for ever",
    )


@case(
    "stats-request", "A request of the host returns the buffer, once", "5.5.6.3", offers=STATS, needs=REQUEST
)
def request(rig: Rig) -> None:
    rig.start()
    for _ in range(3):
        number = offer(rig, _usual())
        rig.quiet()
        used_len = ask(rig, number)
        rig.judge.must(
            used_len == 0, f"the used length is {used_len}, and nothing could be written", "2.7.8.2"
        )


@case("stats-many-rounds", "50 rounds", "5.5.6.3", offers=STATS, needs=REQUEST)
def many_rounds(rig: Rig) -> None:
    rig.start()
    number = offer(rig, _usual())
    for _ in range(50):
        ask(rig, number)
        number = offer(rig, _usual())


@case("stats-values", "The host reads what the driver sent", "5.5.6.3", offers=STATS, needs=READ)
def values(rig: Rig) -> None:
    rig.start()
    expect_read(rig, _usual(), dict(_usual()))


@case("stats-any-order", "Entries may come in any order", "5.5.6.3.2", offers=STATS, needs=READ)
def any_order(rig: Rig) -> None:
    rig.start()
    expect_read(rig, _usual()[::-1], dict(_usual()))


@case("stats-unknown-tags", "Entries with unknown tags are ignored", "5.5.6.3.2", offers=STATS, needs=READ)
def unknown_tags(rig: Rig) -> None:
    rig.start()
    entries = [(0x7777, 1), *_usual()[:4], (0xFFFF, 2), *_usual()[4:], (999, 3)]
    expect_read(rig, entries, dict(_usual()))


@case("stats-subset", "A driver may send some of them only", "5.5.6.3", offers=STATS, needs=READ)
def subset(rig: Rig) -> None:
    rig.start()
    some = [(StatTag.MEMFREE, 111 << 20), (StatTag.MEMTOT, 222 << 20)]
    expect_read(rig, some, dict(some))


@case(
    "stats-values-renewed",
    "The host sees the latest figures, not the first",
    "5.5.6.3",
    offers=STATS,
    needs=READ,
)
def renewed(rig: Rig) -> None:
    rig.start()
    for value in (5 << 20, 6 << 20, 7 << 20):
        number = expect_read(rig, [(StatTag.MEMFREE, value)], {StatTag.MEMFREE: value})
        ask(rig, number)


@case("stats-cut-short", "A last entry that is cut short is tolerated", "5.5.6.3", offers=STATS, lessons=(8,))
def cut_short(rig: Rig) -> None:
    _expect_survival(rig, pack_stats(_usual())[:-3])


@case("stats-shorter-than-an-entry", "A buffer shorter than one entry is tolerated", "5.5.6.3", offers=STATS)
def shorter_than_an_entry(rig: Rig) -> None:
    _expect_survival(rig, b"\x04\x00\x01")


@case("stats-long-buffer", "A buffer of 1000 entries is tolerated", "5.5.6.3", offers=STATS)
def long_buffer(rig: Rig) -> None:
    _expect_survival(rig, pack_stats([(StatTag.MEMFREE, n) for n in range(1000)]))


@case(
    "stats-two-buffers",
    "A second buffer while one is held is survived",
    "5.5.6.3",
    offers=STATS,
    lessons=(8,),
)
def two_buffers(rig: Rig) -> None:
    rig.start(raw={QueueRole.STATS})
    ring = rig.raw[QueueRole.STATS]
    data = pack_stats(_usual())
    at = rig.ram.control(len(data))
    rig.ram.write(at, data)
    # 5.5.6.3.1 allows a driver one; each is notified, since a device need not look for a second.
    for head in range(3):
        ring.guest.offer(ring.guest.chain([(at, len(data), 0)], first=head))
        rig.judge.transcript.sent(f"statistics buffer {head}")
        ring.kick()
    rig.settle(lambda: len(ring.look()) >= 2)
    heads = [head for head, _ in ring.look()]
    rig.judge.must(len(set(heads)) == len(heads), f"a head came back twice: {heads}", "2.7.8")
    rig.judge.should(
        len(heads) in {2, 3} or rig.needs_reset(),
        f"{3 - len(heads)} buffers are kept; one is enough to ask for the next",
        "5.5.6.3",
    )
    rig.expect_recovered()


@case("stats-writable-buffer", "A statistics buffer that is writable is not written", "2.7.8.2", offers=STATS)
def writable_buffer(rig: Rig) -> None:
    rig.start()
    at = rig.ram.control(160)
    rig.ram.write(at, b"\x42" * 160)
    rig.judge.transcript.sent("a statistics buffer with a writable part only")
    (number,) = rig.submit(QueueRole.STATS, [([], [(at, 160)])], wait=False)
    rig.quiet()
    if (used_len := rig.rings[QueueRole.STATS].collect().get(number, 0)) > 0:
        rig.within(used_len, 160)
        rig.judge.must(
            rig.ram.read(at, used_len) != b"\x42" * used_len,
            f"the used length is {used_len}, and not a byte of the buffer was written",
        )
    rig.expect_recovered()


def offer(rig: Rig, entries: Entries) -> int:
    """Send a statistics buffer and return its number."""
    data = pack_stats(entries)
    at = rig.ram.control(len(data))
    rig.ram.write(at, data)
    rig.judge.transcript.sent(f"a statistics buffer with {len(data) // STAT_ENTRY.size} entries")
    (number,) = rig.submit(QueueRole.STATS, [([(at, len(data))], [])], wait=False)
    return number


def ask(rig: Rig, number: int) -> int:
    """Have the host ask for statistics and wait for the buffer; return its used length."""
    rig.judge.transcript.sent("the host asks for statistics")
    rig.connection.request_stats()
    (used_len,) = rig.wait_for(QueueRole.STATS, [number])
    rig.judge.transcript.came(f"the buffer comes back, used length {used_len}")
    return used_len


def expect_read(rig: Rig, entries: Entries, expected: dict[int, int]) -> int:
    """Expect the host to read `expected` after a buffer with `entries`; return the buffer's number.

    Raises:
        Failed: it reads others.
    """
    number = offer(rig, entries)
    wanted = {int(tag): value for tag, value in expected.items()}

    def seen() -> dict[int, int]:
        return {int(tag): value for tag, value in rig.connection.stats().items() if int(tag) in wanted}

    arrived = rig.settle(lambda: seen() == wanted)
    got = seen()
    wrong = {tag: (value, got.get(tag)) for tag, value in wanted.items() if got.get(tag) != value}
    rig.judge.must(arrived, f"the host reads other figures; by tag, sent and read: {wrong}")
    return number


def _usual() -> list[tuple[int, int]]:
    return [(tag, (int(tag) + 3) * 0x0123_4567) for tag in list(StatTag)[:10]]


def _expect_survival(rig: Rig, data: bytes) -> None:
    rig.start()
    at = rig.ram.control(len(data))
    rig.ram.write(at, data)
    rig.judge.transcript.sent(f"a statistics buffer of {len(data)} bytes")
    (number,) = rig.submit(QueueRole.STATS, [([(at, len(data))], [])], wait=False)
    rig.quiet()
    # It may be kept, come back, or stop the device; what it may not do is wedge the queue.
    if rig.needs_reset():
        rig.expect_recovered()
        return
    if number not in rig.rings[QueueRole.STATS].collect() and rig.can(Ability.REQUEST_STATS):
        ask(rig, number)
    rig.judge.safe(rig.connection.alive(), "the device went away")
    rig.expect_recovered()
