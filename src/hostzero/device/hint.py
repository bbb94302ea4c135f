# SPDX-License-Identifier: GPL-2.0-only
"""The free page hint queue: pages whose contents a migration need not send, for now.

The host puts a command id into the configuration space. The driver sends the id as a readable
buffer, then free pages as writable buffers, then STOP; it keeps the pages until it reads DONE
(kernel: `virtio_balloon_free_page_work`, QEMU: `get_free_page_hints`). A run therefore always
ends with `done`, or the guest stays short of the hinted memory.

A hint is no gift: the guest may write to a hinted page again without a word, and afterwards
the page may hold anything. Nothing here is ever claimed to be zero.
"""

from __future__ import annotations

import enum
import struct

from hostzero.device.state import DeviceState
from hostzero.errors import DeviceError
from hostzero.virtio.balloon import CMD_ID_DONE, CMD_ID_MIN, CMD_ID_STOP
from hostzero.virtio.chain import Chain

_CMD_ID = struct.Struct("<I")
_CMD_ID_MAX = 0xFFFF_FFFF


class HintStatus(enum.Enum):
    """Where a run of free page hinting stands."""

    STOPPED = "stopped"
    """No run, or the driver has sent its last page, or the host has stopped the run."""
    REQUESTED = "requested"
    """The host has asked; the driver has not answered with the command id yet."""
    STARTED = "started"
    """The driver is sending pages that belong to the run."""
    DONE = "done"
    """The host needs no hints any more: the driver gives the pages back to the guest."""


class FreePageHintQueue:
    """Serves the free page hint queue.

    Attributes:
        status: where the run stands.
    """

    def __init__(self, state: DeviceState, *, discard: bool) -> None:
        """Discard hinted pages only if `discard` says so (`DeviceConfig.discard_hints`)."""
        self.status = HintStatus.STOPPED
        self._state = state
        self._discard = discard
        self._run = CMD_ID_MIN - 1

    @property
    def cmd_id(self) -> int:
        """The command id as the driver reads it."""
        if self.status is HintStatus.DONE:
            return CMD_ID_DONE
        return CMD_ID_STOP if self.status is HintStatus.STOPPED else self._run

    def start(self) -> None:
        """Ask for a run under a new command id; ids count up from 0x80000000 as in QEMU."""
        self._run = CMD_ID_MIN if self._run >= _CMD_ID_MAX else self._run + 1
        self.status = HintStatus.REQUESTED

    def stop(self) -> None:
        """Want no more pages; those sent stay with the driver until `done`."""
        self.status = HintStatus.STOPPED

    def done(self) -> None:
        """Let the driver give the hinted pages back to the guest."""
        self.status = HintStatus.DONE

    def handle(self, chain: Chain) -> int:
        """Take a command id or a hinted page; the used length is 0 always.

        Raises:
            DeviceError: the buffer is empty, or readable and writable at once, or a command id
                that is not 4 bytes.
        """
        if bool(chain.readable) == bool(chain.writable):
            raise DeviceError("a hint buffer is either a command id to read or pages to write")
        if chain.readable:
            if chain.readable_len != _CMD_ID.size:
                raise DeviceError(f"a command id has {_CMD_ID.size} bytes, not {chain.readable_len}")
            (cmd_id,) = _CMD_ID.unpack(chain.read(_CMD_ID.size))
            self._take_cmd_id(cmd_id)
        elif self.status is HintStatus.STARTED:
            self._state.metrics.hinted_bytes += chain.writable_len
            if self._discard and not self._state.poisoned:
                for segment in chain.writable:
                    self._state.discarder.discard_segment(
                        segment, self._state.rings, self._state.metrics.free_page
                    )
        return 0

    def refused(self) -> None:
        """Do nothing: a hint that was not read is a hint less."""

    def stopped(self) -> None:
        """End a run, whose pages another driver may own next; a DONE stays to be read."""
        if self.status is not HintStatus.DONE:
            self.status = HintStatus.STOPPED

    def reset(self) -> None:
        """End the run; its id is not used again."""
        self.status = HintStatus.STOPPED

    # Any other id than that of the run ends a running run; before it runs, it is left over from
    # an earlier one and means nothing.
    def _take_cmd_id(self, cmd_id: int) -> None:
        if self.status is HintStatus.REQUESTED and cmd_id == self._run:
            self.status = HintStatus.STARTED
        elif self.status is HintStatus.STARTED and cmd_id != self._run:
            self.status = HintStatus.STOPPED
