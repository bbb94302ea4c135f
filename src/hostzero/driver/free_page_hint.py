# SPDX-License-Identifier: GPL-2.0-only
"""Free page hinting (kernel: `report_free_page_func`, FREE_PAGE_HINT).

A host that migrates the guest asks for free memory, which it need not copy. The driver takes
blocks of the largest order from the allocator, hands each over as one buffer, and keeps them:
STOP only pauses, since a migration has many rounds, and DONE gives everything back. What a
hinted block holds afterwards is unknown, so it is freed as an ordinary page, never as zero.

The device ignores buffers that come before the start of a run, so a run that it did not read
to its end does no harm at the next one. Blocks that it has not read are given back only at
DONE, or once the device was reset: until then it may still act on them.
"""

from __future__ import annotations

import logging
from itertools import count
from typing import Final

from hostzero.driver.buffers import DriverBuffers
from hostzero.driver.config_space import ConfigSpace
from hostzero.driver.guest_mm import GuestMm
from hostzero.driver.queues import BalloonQueue
from hostzero.errors import OutOfMemory
from hostzero.mm.gfp import GFP_NOMEMALLOC, GFP_NORETRY, GFP_NOWARN
from hostzero.units import PAGE_SIZE, Pfn, pfn_to_gpa
from hostzero.virtio.balloon import CMD_ID_DONE, CMD_ID_STOP
from hostzero.virtio.ring_layout import Segment

_log = logging.getLogger(__name__)

HINT_BLOCK_ORDER: Final = 10
"""MAX_PAGE_ORDER (kernel: `VIRTIO_BALLOON_HINT_BLOCK_ORDER`)."""

HINT_BLOCK_PAGES: Final = 1 << HINT_BLOCK_ORDER
HINT_BLOCK_BYTES: Final = PAGE_SIZE << HINT_BLOCK_ORDER

FREE_PAGE_ALLOC_FLAG: Final = GFP_NORETRY | GFP_NOMEMALLOC | GFP_NOWARN
"""Neither reclaim nor reserves: only what is free now (kernel: `VIRTIO_BALLOON_FREE_PAGE_ALLOC_FLAG`)."""

_START: Final = "start"
_STOP: Final = "stop"


class FreePageHint:
    """The hinting queue and the blocks that the host was told of.

    Attributes:
        cmd_id_active: the id of the last run that was started (kernel: `vb->cmd_id_active`).
    """

    def __init__(self, mm: GuestMm, buffers: DriverBuffers, queue: BalloonQueue, config: ConfigSpace) -> None:
        self.cmd_id_active = CMD_ID_STOP
        self._mm = mm
        self._buffers = buffers
        self._queue = queue
        self._config = config
        self._tokens = count()
        self._commands_in_flight: set[object] = set()
        self._unread: dict[object, Pfn] = {}
        self._read: list[Pfn] = []

    @property
    def num_free_page_blocks(self) -> int:
        """Blocks held for the host (kernel: `vb->num_free_page_blocks`)."""
        return len(self._unread) + len(self._read)

    def report_free_page_func(self) -> None:
        """Do what the configuration space's command id says: pause, give back, or start a run.

        Any other value than STOP and DONE starts a run, once for each new value.

        Raises:
            HostzeroError: the device breaks a rule of the ring.
        """
        cmd_id = self._config.free_page_hint_cmd_id()
        if cmd_id == CMD_ID_DONE:
            self._collect()
            self.return_free_pages_to_mm()
        elif cmd_id not in {CMD_ID_STOP, self.cmd_id_active}:
            self._report_free_page(cmd_id)

    def return_free_pages_to_mm(self) -> int:
        """Free every block and return the pages in them.

        Only after DONE or a reset of the device: it may act on blocks it has not read yet.
        """
        self._read.extend(self._unread.values())
        self._unread.clear()
        return self._free_read_blocks()

    def shrink(self) -> int:
        """Free the blocks that the device has read and return the pages in them.

        For memory pressure, in the middle of a run too (kernel: the balloon's shrinker).

        Raises:
            HostzeroError: the device breaks a rule of the ring.
        """
        self._collect()
        return self._free_read_blocks()

    def _report_free_page(self, cmd_id: int) -> None:
        self._collect()
        # The command buffers are reused from run to run, so the device must have read them.
        if self._commands_in_flight or self._queue.num_free < 2:
            _log.warning("no hints for command %#x: the device has not read the last run", cmd_id)
            return
        self.cmd_id_active = cmd_id
        self._send_command(_START, self._buffers.put_cmd_id_active(cmd_id))
        self._send_free_pages(cmd_id)
        self._send_command(_STOP, self._buffers.put_cmd_id_stop(CMD_ID_STOP))

    def _send_free_pages(self, cmd_id: int) -> None:
        # Ends when memory does, when the host stops or asks for another run, or when it reads no more.
        while self._config.free_page_hint_cmd_id() == cmd_id and self._has_room():
            try:
                pfn = self._mm.alloc_pages(FREE_PAGE_ALLOC_FLAG, HINT_BLOCK_ORDER)
            except OutOfMemory:
                return
            token = next(self._tokens)
            self._unread[token] = pfn
            self._queue.add([], [Segment(pfn_to_gpa(pfn), HINT_BLOCK_BYTES)], token)
            self._collect()

    def _has_room(self) -> bool:
        # One entry stays free for the stop command (kernel: get_free_page_and_send).
        if self._queue.num_free < 2 and self._queue.may_wait():
            self._collect()
        return self._queue.num_free >= 2

    def _send_command(self, name: str, segment: Segment) -> None:
        self._commands_in_flight.add(name)
        self._queue.add([segment], [], name)
        self._collect()

    def _collect(self) -> None:
        for token, _used_len in self._queue.poll():
            if token in self._unread:
                self._read.append(self._unread.pop(token))
            self._commands_in_flight.discard(token)

    def _free_read_blocks(self) -> int:
        blocks, self._read = self._read, []
        for pfn in blocks:
            self._mm.free_pages(pfn, HINT_BLOCK_ORDER)
        return len(blocks) * HINT_BLOCK_PAGES
