# SPDX-License-Identifier: GPL-2.0-only
"""A zero claim is always true: any requests, in any order, on memory that fails and does not.

This tests the modules of the device together, so it mirrors none of them. After each request
`Guest` has compared all of memory with what it was before: claimed pages read as zero, and no
byte changed that the request did not give away.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostzero.ram import GuestMemory, Ram
from hostzero.units import PAGE_SIZE
from hostzero.virtio.balloon import bitmap_bytes
from hostzero.virtio.features import Feature, QueueRole
from tests.device.guest import (
    ALL_FEATURES,
    BITMAP_AT,
    RAM_PAGES,
    RING_PAGES,
    FailingMemory,
    Guest,
    HugeMemory,
    WrappedMemory,
    ram_of,
)

MEMORIES: dict[str, Callable[[Ram], GuestMemory]] = {
    "proves": WrappedMemory,
    "fails": lambda ram: FailingMemory(ram, lambda pfn: pfn % 7 == 3),
    "raises": lambda ram: FailingMemory(ram, lambda pfn: pfn % 11 == 5, OSError(12, "no memory")),
    "huge": HugeMemory,
}

# Few enough values that requests meet: single pages, ranges that together make host pages of
# 2 MiB, rings of every queue, and numbers without RAM.
PFN = st.one_of(
    st.integers(0, 24),
    st.sampled_from([511, 512, 1023, 1024, RAM_PAGES - 1, RAM_PAGES, 0xFFFF_FFFF]),
    st.sampled_from([pages[0] for pages in RING_PAGES.values()]),
)
PFNS = st.one_of(
    st.lists(PFN, min_size=1, max_size=40),
    st.sampled_from([list(range(first, first + 256)) for first in range(0, 1024, 256)]),
    st.sampled_from([list(range(first + 255, first - 1, -1)) for first in range(0, 1024, 256)]),
)
SEGMENT = st.tuples(st.integers(0, 30), st.integers(1, 6)) | st.sampled_from(
    [(0, 512), (512, 512), (256, 512), (0, 1024), (RING_PAGES[QueueRole.INFLATE][0], 8)]
)
DROPPED = [
    Feature(0),
    Feature.MUST_TELL_HOST,
    Feature.PAGE_POISON,
    Feature.DEVICE_INIT_REPORTED,
    Feature.DEVICE_INIT_ON_INFLATE,
    Feature.RING_EVENT_IDX,
    Feature.STATS_VQ | Feature.FREE_PAGE_HINT,
]


class ZeroClaims(RuleBasedStateMachine):
    """One guest and its device, and a count of the claims that the guest has read."""

    @initialize(
        backing=st.sampled_from(["anonymous", "memfd"]),
        memory=st.sampled_from(sorted(MEMORIES)),
        dropped=st.sampled_from(DROPPED),
    )
    def start(self, backing: str, memory: str, dropped: Feature) -> None:
        self.stack = ExitStack()
        ram = self.stack.enter_context(ram_of(backing))
        self.guest = Guest(MEMORIES[memory](ram), accepted=ALL_FEATURES & ~dropped)
        self.inflate_bits = 0
        self.reported_bytes = 0

    def teardown(self) -> None:
        if hasattr(self, "guest"):
            self.guest.device.reset()
            del self.guest
            self.stack.close()

    @rule(pfns=PFNS, where=st.sampled_from(["own page", "given page", "short", "long", "split", "none"]))
    def inflate(self, pfns: list[int], where: str) -> None:
        length = bitmap_bytes(len(pfns))
        given = min(pfns)
        segments = {
            "own page": [(BITMAP_AT, length)],
            # The bitmap in a page of the request, over its end if it is longer than one byte.
            "given page": [((given + 1) * PAGE_SIZE - 1, length)] if given < 1024 else [(BITMAP_AT, length)],
            "short": [(BITMAP_AT, (length + 1) // 2)],
            "long": [(BITMAP_AT, length + 9)],
            "split": [(BITMAP_AT, 1), (BITMAP_AT + 64, length)],
            "none": [],
        }[where]
        answer = self.guest.inflate(pfns, segments)
        bits = sum(answer.bitmap[n // 8] >> n % 8 & 1 for n in range(min(len(pfns), answer.used_len * 8)))
        self.inflate_bits += bits
        room = sum(size for _, size in segments)
        asked = Feature.DEVICE_INIT_ON_INFLATE in self.guest.accepted and not self.poisoned()
        assert answer.used_len == (min(length, room) if asked else 0)

    def poisoned(self) -> bool:
        return Feature.PAGE_POISON in self.guest.accepted and self.guest.device.poison_val != 0

    @rule(pfns=PFNS)
    def deflate(self, pfns: list[int]) -> None:
        self.guest.deflate(pfns)

    @rule(segments=st.lists(SEGMENT, min_size=1, max_size=3))
    def report(self, segments: list[tuple[int, int]]) -> None:
        used_len = self.guest.report(*segments)
        if Feature.DEVICE_INIT_REPORTED not in self.guest.accepted or self.poisoned():
            assert used_len == 0
        self.reported_bytes += used_len

    @rule()
    def dirty(self) -> None:
        self.guest.fill()

    @rule(value=st.sampled_from([b"\0\0\0\0", b"\0\0\0\x01"]))
    def poison(self, value: bytes) -> None:
        self.guest.device.write_config(12, value)

    @rule()
    def inhibit(self) -> None:
        self.guest.device.inhibit_discard("test")

    @precondition(lambda self: self.guest.device.inhibited)
    @rule()
    def allow(self) -> None:
        self.guest.device.allow_discard("test")

    @rule()
    def reset(self) -> None:
        self.guest.device.set_status(0)
        self.guest.start()

    @invariant()
    def metrics_are_exact(self) -> None:
        metrics = self.guest.device.metrics
        assert metrics.inflate.claims == self.inflate_bits
        assert metrics.reporting.claimed_zero_bytes == self.reported_bytes
        for queue in metrics.queues.values():
            assert queue.claimed_zero_bytes <= queue.proven_zero_bytes <= queue.discarded_bytes
        assert metrics.malformed == metrics.broken_queues == 0


# Few long runs: each opens guest RAM.
TestZeroClaims = ZeroClaims.TestCase
TestZeroClaims.settings = settings(max_examples=30, stateful_step_count=25)
