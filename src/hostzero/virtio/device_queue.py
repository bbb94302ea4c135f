# SPDX-License-Identifier: GPL-2.0-only
"""The host's end of a split virtqueue, over bytes that a hostile guest writes (virtio 1.3, 2.7).

Every field of the ring that the guest can write is copied once and then checked, so that
nothing changes between the check and the use. Of the used ring, which lies in guest memory
too, the device reads nothing back: its index lives here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from hostzero.errors import RingError
from hostzero.ram import GuestMemory
from hostzero.virtio.barrier import full_barrier, load_le16, store_le16
from hostzero.virtio.chain import BadChain, Chain, walk_chain
from hostzero.virtio.ring_layout import (
    DESC,
    RING_HEADER,
    USED_ELEM,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_USED_F_NO_NOTIFY,
    RingLayout,
    need_event,
    ring_bytes,
)

_log = logging.getLogger(__name__)

# Positions in the rings as arrays of 16-bit words; the event index stands behind the entries.
_FLAGS = 0
_IDX = 1
_ENTRIES = 2


class _Popped(NamedTuple):
    position: int  # the available index of its entry
    writable_len: int


class DeviceQueue:
    """One virtqueue as its device holds it.

    Serve it so: `pop` until it returns None, `push` each head once, `flush`. `interrupt` may
    run the driver at once, and the driver may come back into this queue before `interrupt`
    returns: no state is half changed by then.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: RingLayout,
        *,
        event_idx: bool,
        interrupt: Callable[[], None],
        start_index: int = 0,
    ) -> None:
        """Take the ring over; nothing is written until the first `pop`.

        Args:
            memory: the guest's memory, which holds the ring and every buffer.
            layout: where the ring lies.
            event_idx: whether RING_EVENT_IDX was negotiated.
            interrupt: tells the driver that buffers were used.
            start_index: where both indices start; other than 0 only for a queue that is
                resumed (vhost-user: SET_VRING_BASE).
        """
        self.layout = layout
        self.broken: RingError | None = None
        self._memory = memory
        self._event_idx = event_idx
        self._interrupt = interrupt
        desc_bytes, avail_bytes, used_bytes = ring_bytes(layout.size)
        self._desc = memory.view(layout.desc, desc_bytes)
        self._used_bytes = memory.view(layout.used, used_bytes)
        self._avail = memory.view(layout.avail, avail_bytes).cast("H")
        self._used = self._used_bytes.cast("H")
        self._used_event_at = _ENTRIES + layout.size
        self._avail_event_at = _ENTRIES + 4 * layout.size
        self._last_avail = self._seen_avail = start_index & 0xFFFF
        self._used_idx = self._flushed = start_index & 0xFFFF
        self._popped: dict[int, _Popped] = {}

    @property
    def last_avail(self) -> int:
        """The index of the next available entry to pop, modulo 2^16 (GET_VRING_BASE)."""
        return self._last_avail

    @property
    def used_idx(self) -> int:
        """The index of the next used entry to write, modulo 2^16, pushed but perhaps not flushed."""
        return self._used_idx

    @property
    def in_flight(self) -> int:
        """Heads that were popped and not pushed."""
        return len(self._popped)

    def pop(self) -> Chain | BadChain | None:
        """Take the next available request.

        Returns:
            A checked chain; or a `BadChain`, whose head must be pushed with length 0; or None
            if nothing is available, in which case the driver will notify for the next one;
            None also on a broken queue.

        Raises:
            RingError: the ring as a whole cannot be trusted: the available index moved by
                more than the ring holds (so also if it moved backwards), or an entry names a
                descriptor outside the table or one that is in flight. The queue is broken
                until it is set up again; heads popped before can still be pushed.
        """
        if self.broken is not None:
            return None
        # The second look is for what came between the first and the request to be notified.
        if self._last_avail == self._seen_avail and not self._look() and not self.enable_notifications():
            return None
        entry = _ENTRIES + self._last_avail % self.layout.size
        head = load_le16(self._avail, entry)
        if head >= self.layout.size:
            raise self._break(f"the available ring names descriptor {head} on a ring of {self.layout.size}")
        if head in self._popped:
            raise self._break(f"the available ring names descriptor {head}, which is in flight already")
        item = walk_chain(self._memory, self.layout.size, head, self._read_descriptor)
        self._popped[head] = _Popped(self._last_avail, item.writable_len if isinstance(item, Chain) else 0)
        self._last_avail = (self._last_avail + 1) & 0xFFFF
        return item

    def push(self, head: int, used_len: int) -> None:
        """Return a popped head, saying how many of its writable bytes were written from the start.

        The driver sees it after `flush`. Every head that `pop` returned is pushed exactly once.

        Raises:
            RingError: the head was not popped or was pushed before, or `used_len` is negative
                or beyond the writable bytes, or beyond 32 bits: a bug of the device itself.
                Nothing was written.
        """
        popped = self._popped.get(head)
        if popped is None:
            raise RingError(f"head {head} was pushed, but it is not in flight")
        if not 0 <= used_len <= min(popped.writable_len, 0xFFFF_FFFF):
            # 2.7.8.2: a device must have written as much as it says.
            raise RingError(
                f"a used length of {used_len} for the {popped.writable_len} writable bytes of head {head}"
            )
        del self._popped[head]
        slot = self._used_idx % self.layout.size
        USED_ELEM.pack_into(self._used_bytes, RING_HEADER + USED_ELEM.size * slot, head, used_len)
        self._used_idx = (self._used_idx + 1) & 0xFFFF

    def flush(self) -> bool:
        """Publish what was pushed and interrupt the driver unless it asked not to be.

        Returns:
            Whether `interrupt` was called. With nothing new to publish it is not.
        """
        old, new = self._flushed, self._used_idx
        if old == new:
            return False
        self._flushed = new
        # 2.7.8.2: the entries and the buffers before the index. 2.7.7.2: the index before the
        # suppression fields.
        full_barrier()
        store_le16(self._used, _IDX, new)
        full_barrier()
        if self._event_idx:
            wanted = need_event(load_le16(self._avail, self._used_event_at), new, old)
        else:
            wanted = not load_le16(self._avail, _FLAGS) & VIRTQ_AVAIL_F_NO_INTERRUPT
        if wanted:
            self._interrupt()
        return wanted

    def rewind(self) -> int:
        """Make the heads in flight available again, for a device that stops; return how many.

        Afterwards `last_avail` and `used_idx` are equal, and a queue set up with that
        `start_index` pops the same requests again (vhost-user: GET_VRING_BASE, SET_VRING_BASE).

        Raises:
            RingError: a head that was popped after one of these has been pushed already, so
                that going back would pop it again: push the others first. Nothing changed.
        """
        count = len(self._popped)
        first = (self._last_avail - count) & 0xFFFF
        if any((popped.position - first) & 0xFFFF >= count for popped in self._popped.values()):
            raise RingError("requests were used out of order: those in flight cannot be made available again")
        self._popped.clear()
        self._last_avail = self._seen_avail = first
        return count

    def enable_notifications(self) -> bool:
        """Ask to be notified of the next available buffer, and look again.

        Returns:
            Whether something is available already: it may have come before the driver could
            see the request, and then no notification comes for it.

        Raises:
            RingError: as `pop`.
        """
        if self.broken is not None:
            return False
        if self._event_idx:
            # 2.7.10.2: with the event index, flags stays 0.
            store_le16(self._used, self._avail_event_at, self._last_avail)
        else:
            store_le16(self._used, _FLAGS, 0)
        full_barrier()
        return self._look()

    def disable_notifications(self) -> None:
        """Ask not to be notified while the queue is being served; `pop` ends that at None.

        With the event index there is nothing to write: the index asked for last is passed.
        """
        if self.broken is None and not self._event_idx:
            store_le16(self._used, _FLAGS, VIRTQ_USED_F_NO_NOTIFY)

    def release(self) -> None:
        """Let go of the ring's memory, so that the region can be unmapped; then it is broken."""
        self._popped.clear()
        self._flushed = self._used_idx
        self.broken = self.broken or RingError("its memory was released")
        for view in (self._avail, self._used, self._used_bytes, self._desc):
            view.release()

    def _look(self) -> bool:
        # One load of the index, copied before it is checked.
        seen = load_le16(self._avail, _IDX)
        ahead = (seen - self._last_avail) & 0xFFFF
        if ahead > self.layout.size:
            raise self._break(f"the available index is {ahead} ahead on a ring of {self.layout.size} (2.7.6)")
        self._seen_avail = seen
        if ahead:
            # The index before the entries and descriptors that it covers (2.7.13, step 4).
            full_barrier()
        return bool(ahead)

    def _read_descriptor(self, index: int) -> tuple[int, int, int, int]:
        # unpack_from copies the 16 bytes into Python integers, each byte read once: a guest that
        # rewrites the descriptor after this line changes nothing that was checked.
        addr, length, flags, following = DESC.unpack_from(self._desc, DESC.size * index)
        return addr, length, flags, following

    def _break(self, reason: str) -> RingError:
        self.broken = RingError(reason)
        _log.warning("virtqueue broken: %s", reason)
        return self.broken
