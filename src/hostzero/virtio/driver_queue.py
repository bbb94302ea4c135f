# SPDX-License-Identifier: GPL-2.0-only
"""The guest's end of a split virtqueue (virtio 1.3, 2.7; kernel: `drivers/virtio/virtio_ring.c`).

The device may be hostile. What the driver needs to know later (which descriptors a chain has,
which heads are in flight) it keeps for itself and never reads back from the ring. The used
ring is read, checked as a whole, and only then believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.virtio.barrier import full_barrier, load_le16, store_le16
from hostzero.virtio.ring_layout import (
    CHAIN_BYTES_MAX,
    DESC,
    RING_HEADER,
    USED_ELEM,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
    RingLayout,
    Segment,
    need_event,
    ring_bytes,
)

_log = logging.getLogger(__name__)

# Positions in the rings as arrays of 16-bit words; the event index stands behind the entries.
_FLAGS = 0
_IDX = 1
_ENTRIES = 2


class _Pending(NamedTuple):
    token: object
    descriptors: tuple[int, ...]


class DriverQueue:
    """One virtqueue as its driver holds it; indirect descriptors are never used.

    The memory of the ring is zeroed first (virtio 1.3, 2.7.10.1), so make the queue before
    the device learns of the layout. `notify` may run the device at once, and the device may
    call back into this queue before `notify` returns: no state is half changed by then.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        event_idx: bool,
        notify: Callable[[], None],
        start_index: int = 0,
    ) -> None:
        """Take the ring over, empty.

        Args:
            memory: the guest's memory, which holds the ring and every buffer.
            layout: where the ring lies.
            event_idx: whether RING_EVENT_IDX was negotiated.
            notify: tells the device that buffers are available.
            start_index: the value both indices start from; virtio 1.3, 2.7.6 says 0, and a
                queue that is resumed goes on from its last index.
        """
        self.layout = layout
        self.broken: RingError | None = None
        self._memory = memory
        self._event_idx = event_idx
        self._notify = notify
        desc_bytes, avail_bytes, used_bytes = ring_bytes(layout.size)
        self._desc = memory.view(layout.desc, desc_bytes)
        self._used_bytes = memory.view(layout.used, used_bytes)
        self._avail = memory.view(layout.avail, avail_bytes).cast("H")
        self._used = self._used_bytes.cast("H")
        self._desc[:] = bytes(desc_bytes)
        self._avail[:] = memoryview(bytes(avail_bytes)).cast("H")
        self._used_bytes[:] = bytes(used_bytes)
        self._used_event_at = _ENTRIES + layout.size
        self._avail_event_at = _ENTRIES + 4 * layout.size
        self._free = list(range(layout.size - 1, -1, -1))
        # Added but not yet visible to the device: it cannot have used those.
        self._unpublished: dict[int, _Pending] = {}
        self._published: dict[int, _Pending] = {}
        self._avail_idx = self._last_used = start_index & 0xFFFF
        for words, event_at in ((self._avail, self._used_event_at), (self._used, self._avail_event_at)):
            store_le16(words, _IDX, self._avail_idx)
            store_le16(words, event_at, self._avail_idx)

    @property
    def num_free(self) -> int:
        """Descriptors that no chain occupies."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """Chains that were added and not yet collected, published or not."""
        return len(self._published) + len(self._unpublished)

    def add(self, out: Sequence[Segment], in_: Sequence[Segment], token: object) -> int:
        """Place one request into the descriptor table and the available ring; return its head.

        The device sees it after `kick`.

        Args:
            out: what the device reads, in order.
            in_: what the device writes, in order; it comes after `out` (virtio 1.3, 2.7.4.2).
            token: what `collect` returns for this request.

        Raises:
            RingError: "ring full" if fewer descriptors are free than segments were given; or
                the request itself breaks a rule: it is empty, a segment is empty or not in
                guest memory, or the segments exceed 2^32 bytes (virtio 1.3, 2.7.5.2); or the
                queue is broken. Nothing was added.
        """
        if self.broken is not None:
            raise RingError(f"the queue is broken: {self.broken}")
        segments = [*out, *in_]
        self._check_request(segments)
        if len(segments) > len(self._free):
            raise RingError(
                f"ring full: the request needs {len(segments)} descriptors and {len(self._free)} "
                f"of {self.layout.size} are free"
            )
        indices = [self._free.pop() for _ in segments]
        for position, ((gpa, length), index) in enumerate(zip(segments, indices, strict=True)):
            flags = VIRTQ_DESC_F_WRITE if position >= len(out) else 0
            following = 0
            if position + 1 < len(indices):
                flags |= VIRTQ_DESC_F_NEXT
                following = indices[position + 1]
            DESC.pack_into(self._desc, DESC.size * index, gpa, length, flags, following)
        head = indices[0]
        slot = (self._avail_idx + len(self._unpublished)) % self.layout.size
        store_le16(self._avail, _ENTRIES + slot, head)
        self._unpublished[head] = _Pending(token, tuple(indices))
        return head

    def kick(self) -> bool:
        """Publish what was added and notify the device unless it asked not to be.

        Returns:
            Whether `notify` was called. With nothing new to publish, or on a broken queue, it
            is not.
        """
        if self.broken is not None or not self._unpublished:
            return False
        old, new = self._avail_idx, (self._avail_idx + len(self._unpublished)) & 0xFFFF
        self._avail_idx = new
        self._published.update(self._unpublished)
        self._unpublished.clear()
        # 2.7.13, step 4: entries before the index. Step 6: the index before the suppression fields.
        full_barrier()
        store_le16(self._avail, _IDX, new)
        full_barrier()
        if self._event_idx:
            wanted = need_event(load_le16(self._used, self._avail_event_at), new, old)
        else:
            wanted = not load_le16(self._used, _FLAGS) & VIRTQ_USED_F_NO_NOTIFY
        if wanted:
            self._notify()
        return wanted

    def collect(self) -> list[tuple[object, int]]:
        """Take back every request that the device has used: (token, used length in bytes).

        The length is as the device wrote it. A hostile device may claim more than the buffer
        holds; whoever treats it as evidence compares it with the exact length that it expects
        (virtio 1.3, 2.7.8.3).

        Raises:
            RingError: the used index moved by more than was in flight, or an entry names a
                chain that is not in flight: out of range, never published, or returned twice.
                The queue is broken from then on. No request of this call is handed out, since
                nothing that such a device says is evidence; `detach_unused` has them all.
        """
        if self.broken is not None:
            raise RingError(f"the queue is broken: {self.broken}")
        collected: list[tuple[object, int]] = []
        while batch := self._read_used():
            for head, length in batch:
                pending = self._published.pop(head)
                self._free.extend(reversed(pending.descriptors))
                collected.append((pending.token, length))
            self._last_used = (self._last_used + len(batch)) & 0xFFFF
            if self._event_idx:
                # Ask for an interrupt at the next entry, then look again: the device may have
                # used a buffer before it could see the request (2.7.7 and 2.7.14).
                store_le16(self._avail, self._used_event_at, self._last_used)
                full_barrier()
        return collected

    def detach_unused(self) -> list[object]:
        """Take back the tokens of all requests that were not collected, oldest first.

        Only for a device that was reset (kernel: `virtqueue_detach_unused_buf`): the queue is
        empty afterwards and broken, since the device's indices are no longer known.
        """
        tokens = [pending.token for pending in (*self._published.values(), *self._unpublished.values())]
        self._published.clear()
        self._unpublished.clear()
        self._free = list(range(self.layout.size - 1, -1, -1))
        if self.broken is None:
            self.broken = RingError("its requests were detached")
        return tokens

    def release(self) -> None:
        """Let go of the ring's memory, so that the region can be unmapped; then it is broken."""
        self.broken = self.broken or RingError("its memory was released")
        for view in (self._avail, self._used, self._used_bytes, self._desc):
            view.release()

    def _check_request(self, segments: Sequence[Segment]) -> None:
        if not segments:
            raise RingError("a request needs at least one segment (virtio 1.3, 2.7.13.1)")
        for gpa, length in segments:
            if not 1 <= length < 1 << 32:
                raise RingError(f"a segment of {length} bytes does not fit the 32-bit length of a descriptor")
            if not self._memory.contains(gpa, length):
                raise RingError(f"the segment of {length} bytes at {gpa:#x} is not all in guest memory")
        total = sum(int(length) for _, length in segments)
        if total > CHAIN_BYTES_MAX:
            raise RingError(f"a request of {total} bytes is longer than 2^32 (virtio 1.3, 2.7.5.2)")

    def _read_used(self) -> list[tuple[int, int]]:
        # Each field is read once, into Python integers: the device cannot change it after the check.
        count = (load_le16(self._used, _IDX) - self._last_used) & 0xFFFF
        if count > len(self._published):
            raise self._break(
                f"the used index moved by {count} with {len(self._published)} requests in flight"
            )
        if count:
            # The index before the entries that it covers (2.7.14).
            full_barrier()
        batch: dict[int, int] = {}
        for step in range(count):
            slot = (self._last_used + step) % self.layout.size
            head, length = USED_ELEM.unpack_from(self._used_bytes, RING_HEADER + USED_ELEM.size * slot)
            if head not in self._published or head in batch:
                raise self._break(self._why_not_in_flight(head, head in batch))
            batch[head] = length
        return list(batch.items())

    def _why_not_in_flight(self, head: int, twice: bool) -> str:
        if head >= self.layout.size:
            return f"the device returned id {head} on a ring of {self.layout.size}"
        if twice:
            return f"the device returned id {head} twice"
        if head in self._unpublished:
            return f"the device returned id {head}, which was not yet published to it"
        return f"the device returned id {head}, which is not in flight"

    def _break(self, reason: str) -> RingError:
        self.broken = RingError(reason)
        _log.warning("virtqueue broken: %s", reason)
        return self.broken
