# SPDX-License-Identifier: GPL-2.0-only
"""Queue numbers, and rings of other sizes than usual.

Virtio 1.3, 5.5.2 gives every queue a fixed number; Linux counts the queues that were negotiated
and leaves no gap, and a device that does otherwise does not work with Linux as soon as a driver
accepts a later queue without an earlier one. The three ways agree if every feature with a queue
is offered and accepted.
"""

from __future__ import annotations

import itertools

from hostzero.conform.bringup import NOTHING, USUAL
from hostzero.conform.case import case
from hostzero.conform.judge import Failed
from hostzero.conform.rig import Rig
from hostzero.errors import DeviceError
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole, names, queue_roles

QUEUES = (Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING)


@case("number-all", "With every queue negotiated the numbers are those of the specification", "5.5.2")
def all_queues(rig: Rig) -> None:
    rig.start()
    expect_roles(rig)


@case(
    "number-dense",
    "Queues are numbered over what was accepted, as Linux does",
    "5.5.2",
    offers=Feature.REPORTING,
    lessons=(11,),
)
def dense(rig: Rig) -> None:
    offered = rig.offered()
    wrong = []
    for without in _subsets(tuple(feature for feature in QUEUES if feature in offered)):
        rig.renew()
        features = offered & USUAL & ~without
        if Feature.REPORTING in without:
            features &= ~Feature.DEVICE_INIT_REPORTED
        try:
            rig.start(features)
            expect_roles(rig)
        except (Failed, DeviceError) as error:
            wrong.append(f"without {', '.join(names(without)) or 'nothing'}: {error}")
            rig.connect()
    rig.judge.should(not wrong, f"in {len(wrong)} of the sets of queues: {'; '.join(wrong[:2])}")


@case("number-no-more", "There is no queue behind the last", "5.5.2")
def no_more(rig: Rig) -> None:
    rig.start()
    size = rig.transport.queue_size_max(len(QueueRole))
    rig.judge.should(size == 0, f"queue {len(QueueRole)} has {size} entries, and no balloon has such a queue")


@case("number-small-rings", "Rings smaller than the device offers work", "2.7")
def small_rings(rig: Rig) -> None:
    for size in (2, 4, 16):
        rig.start(sizes=dict.fromkeys(QueueRole, size))
        for _ in range(2 * size):
            rig.expect_works()
        rig.renew()


def expect_roles(rig: Rig) -> None:
    """Expect each queue that carries requests of its own kind to answer one.

    Raises:
        Failed: one does not, or does something else.
    """
    roles = queue_roles(rig.accepted)
    page = rig.ram.pages(4)
    rig.inflate([page])
    rig.deflate([page])
    if QueueRole.REPORTING in roles:
        rig.report(((page + 2) * PAGE_SIZE, PAGE_SIZE))
    if QueueRole.STATS in roles:
        # The device keeps the buffer (5.5.6.3), which no other queue does.
        at = rig.ram.control(10)
        (number,) = rig.submit(QueueRole.STATS, [([(at, 10)], [])], wait=False)
        rig.quiet()
        rig.judge.must(
            number not in rig.rings[QueueRole.STATS].collect(),
            f"queue {rig.rings[QueueRole.STATS].index} returned the first statistics buffer at once",
        )
    if QueueRole.FREE_PAGE in roles:
        at = rig.ram.control(4)
        rig.send(QueueRole.FREE_PAGE, [(at, 4)])
    rig.expect_untouched()


def _subsets(features: tuple[Feature, ...]) -> list[Feature]:
    found = []
    for count in range(len(features) + 1):
        for chosen in itertools.combinations(features, count):
            without = NOTHING
            for feature in chosen:
                without |= feature
            found.append(without)
    return found
