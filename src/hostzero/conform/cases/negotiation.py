# SPDX-License-Identifier: GPL-2.0-only
"""Negotiation: what is offered, which subsets are taken, the status, and the reset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hostzero.conform.bringup import STARTED, USUAL
from hostzero.conform.case import case
from hostzero.conform.judge import NotApplicable
from hostzero.conform.rig import Rig
from hostzero.conform.target import Ability
from hostzero.errors import TargetError
from hostzero.virtio.features import Feature, QueueRole, names
from hostzero.virtio.transport import Status

BALLOON_BITS = (1 << 24) - 1
"""Bits of the device type (virtio 1.3, 2.2)."""

TRANSPORT_BITS = {24, 27, 28, 29, *range(32, 44)}
"""Bits that virtio 1.3, 6 and its legacy sections define."""

DEFINED = 0xFF | sum(1 << bit for bit in TRANSPORT_BITS)


@case("negotiate-version-1", "VERSION_1 is offered", "6.2")
def version_1(rig: Rig) -> None:
    offered = rig.offered()
    rig.judge.must(Feature.VERSION_1 in offered, f"{offered:#x} is offered, without VERSION_1 (bit 32)")


@case("negotiate-nothing-undefined", "No bit is offered that nobody has defined", "2.2.2", lessons=(10,))
def nothing_undefined(rig: Rig) -> None:
    undefined = int(rig.offered()) & ~DEFINED
    rig.judge.must(not undefined, f"offered are {', '.join(names(undefined))}, which have no definition")


@case("negotiate-bit6-needs-reporting", "Bit 6 is offered only beside REPORTING", "2.2.2", lessons=(7,))
def bit6_needs_reporting(rig: Rig) -> None:
    offered = rig.offered()
    if Feature.DEVICE_INIT_REPORTED not in offered:
        raise NotApplicable("bit 6 is not offered")
    rig.judge.must(
        Feature.REPORTING in offered,
        "bit 6 (DEVICE_INIT_REPORTED) is offered without REPORTING (bit 5), to which it belongs",
    )


@case("negotiate-offer-is-stable", "The offer is the same after a reset", "2.2.2", needs=[Ability.RESET])
def offer_is_stable(rig: Rig) -> None:
    before = rig.offered()
    rig.start()
    rig.reset()
    after = rig.offered()
    rig.judge.should(
        before == after, f"offered were {', '.join(names(before))}, after a reset {', '.join(names(after))}"
    )


@case("negotiate-all", "Everything that is offered can be accepted together", "2.2.2")
def everything(rig: Rig) -> None:
    rig.start()
    rig.expect_works()


@case("negotiate-least", "VERSION_1 alone is enough", "2.2.2")
def least(rig: Rig) -> None:
    # 5.5.3.2: a device may insist on MUST_TELL_HOST.
    features = Feature.VERSION_1 | (rig.offered() & Feature.MUST_TELL_HOST)
    if rig.judge.should(rig.start(features, insist=False), "a driver with VERSION_1 alone is refused"):
        rig.expect_works()


@case("negotiate-subsets", "Each valid subset of what is offered is accepted", "2.2.2", lessons=(11,))
def subsets(rig: Rig) -> None:
    refused = []
    for features in valid_subsets(rig.offered()):
        rig.renew()
        if rig.start(features, insist=False):
            rig.deflate([rig.ram.last_pages(2)])
        else:
            refused.append(features)
    shown = "; ".join(", ".join(names(features)) for features in refused[:3])
    rig.judge.should(not refused, f"{len(refused)} subsets are refused, such as {shown}")


def valid_subsets(offered: Feature) -> Iterator[Feature]:
    """Every set of the balloon's features with VERSION_1, bit 6 only beside REPORTING."""
    bits = [Feature(1 << bit) for bit in range(24) if int(offered) >> bit & 1 and DEFINED >> bit & 1]
    for count in range(len(bits) + 1):
        for chosen in itertools.combinations(bits, count):
            features = Feature.VERSION_1
            for bit in chosen:
                features |= bit
            # 5.5.3.2: a device may insist on MUST_TELL_HOST.
            if Feature.MUST_TELL_HOST in offered and Feature.MUST_TELL_HOST not in features:
                continue
            if Feature.DEVICE_INIT_REPORTED in features and Feature.REPORTING not in features:
                continue
            yield features


@case(
    "negotiate-refuses-unoffered",
    "A bit that was not offered is not accepted",
    "2.2.2",
    needs=[Ability.FEATURES_OK],
)
def refuses_unoffered(rig: Rig) -> None:
    offered = rig.offered()
    # A bit of the device type that nobody has defined, so that no device can mean anything by it.
    unoffered = Feature(next(1 << bit for bit in range(23, 7, -1) if not int(offered) >> bit & 1))
    try:
        held = rig.negotiate((offered & USUAL) | unoffered)
    except TargetError as error:
        # A vhost-user backend may end the session with a front end that asks for the impossible.
        rig.judge.transcript.came(f"the connection ends: {error}")
        rig.connect()
        rig.start()
        rig.expect_works()
        return
    rig.judge.should(
        not held, f"FEATURES_OK is set although {', '.join(names(unoffered))} was accepted and not offered"
    )


@case("negotiate-status", "The status reads as it was written", "2.1", needs=[Ability.FEATURES_OK])
def status(rig: Rig) -> None:
    first = rig.transport.status()
    rig.judge.must(first == 0, f"the status of a fresh device reads {first:#x}, not 0")
    rig.start()
    wanted = STARTED | Status.FEATURES_OK | Status.DRIVER_OK
    seen = rig.transport.status()
    rig.judge.must(seen == wanted, f"the status was written as {wanted:#x} and reads {seen:#x}")


@case("negotiate-nothing-before-driver-ok", "No buffer is taken before DRIVER_OK, and then it is", "2.1.2")
def nothing_before_driver_ok(rig: Rig) -> None:
    def early() -> None:
        ring = rig.raw[QueueRole.DEFLATE]
        gpa, length = rig.write_pfns([rig.ram.pages(1)])
        ring.guest.offer(ring.guest.chain([(gpa, length, 0)]))
        rig.judge.transcript.sent("a deflate request, before DRIVER_OK")
        rig.quiet()
        rig.judge.must(not ring.look(), f"used entries before DRIVER_OK: {ring.returned}")
        rig.judge.must(not ring.interrupts, "a used buffer notification before DRIVER_OK")

    rig.start(raw={QueueRole.DEFLATE}, before_ok=early)
    ring = rig.raw[QueueRole.DEFLATE]
    ring.kick()
    rig.judge.must(
        rig.settle(lambda: len(ring.look()) == 1),
        "a buffer that was made available before DRIVER_OK was not used afterwards",
        "3.1.1",
    )


@case("negotiate-reset", "A reset brings the status to 0", "2.4.1", needs=[Ability.RESET])
def reset(rig: Rig) -> None:
    rig.start()
    rig.expect_works()
    rig.reset()
    seen = rig.transport.status()
    rig.judge.must(seen == 0, f"after a reset the status reads {seen:#x}")


@case(
    "negotiate-reset-leaves-rings",
    "After a reset the old rings are left alone",
    "2.4.1",
    needs=[Ability.RESET],
)
def reset_leaves_rings(rig: Rig) -> None:
    rig.start(raw={QueueRole.DEFLATE, QueueRole.STATS} & _optional(rig), drop=Feature.RING_EVENT_IDX)
    rings = list(rig.raw.values())
    gpa, length = rig.write_pfns([rig.ram.pages(1)])
    if stats := rig.raw.get(QueueRole.STATS):
        at = rig.ram.control(10)
        stats.guest.offer(stats.guest.chain([(at, 10, 0)]))
        stats.kick()
        rig.quiet()
    before = [ring.guest.used_idx for ring in rings]
    rig.reset()
    deflate = next(ring for ring in rings if ring.role is QueueRole.DEFLATE)
    deflate.guest.offer(deflate.guest.chain([(gpa, length, 0)]))
    rig.judge.transcript.sent("a deflate request into the old ring, without notification")
    if stats and rig.can(Ability.REQUEST_STATS):
        rig.judge.transcript.sent("the host asks for statistics")
        rig.connection.request_stats()
    rig.quiet()
    for ring, index in zip(rings, before, strict=True):
        rig.judge.must(
            ring.guest.used_idx == index,
            f"the used index of the old {ring.role.value} queue went from {index} to {ring.guest.used_idx}",
        )


@case("negotiate-again", "The same features are accepted again after a reset", "2.2.2")
def again(rig: Rig) -> None:
    rig.start()
    rig.expect_works()
    accepted = rig.accepted
    rig.renew()
    if rig.judge.should(
        rig.start(accepted, insist=False),
        f"{', '.join(names(accepted))} were accepted, and after a reset they are not",
    ):
        rig.expect_works()


@case(
    "negotiate-other-features-after-reset",
    "After a reset the features of the last driver count no more",
    "2.2",
    offers=Feature.DEVICE_INIT_ON_INFLATE,
)
def other_features(rig: Rig) -> None:
    rig.start()
    rig.inflate([rig.ram.pages(1)])
    rig.renew()
    rig.start(drop=Feature.DEVICE_INIT_ON_INFLATE)
    at = rig.ram.control(8)
    rig.ram.write(at, b"\xee" * 8)
    answer = rig.inflate([rig.ram.pages(1)], bitmap=[(at, 1)], ones=True)
    rig.judge.must(
        answer.used_len == 0 and answer.bitmap == b"\xff",
        f"without bit 7 this time, a bitmap was written: used length {answer.used_len}, "
        f"bytes {answer.bitmap.hex()}",
    )


def _optional(rig: Rig) -> set[QueueRole]:
    stats = {QueueRole.STATS} if Feature.STATS_VQ in rig.offered() else set()
    return {QueueRole.DEFLATE, *stats}
