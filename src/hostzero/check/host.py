# SPDX-License-Identifier: GPL-2.0-only
"""A host that fails at times and answers less than it could, and what it did prove.

Nothing is asked of the guest here. What the host has shown is what `GuestMemory.discard` returned
during a request, together with what the answer to that request said; a guest that claims more
has made it up. Everything is replaced on the instances of one machine, nothing in the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from hostzero.errors import DeviceError
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, Gpa
from hostzero.virtio.balloon import unpack_pfns
from hostzero.virtio.chain import Chain
from hostzero.virtio.features import Feature, QueueRole

if TYPE_CHECKING:
    from hostzero.machine import Machine
    from hostzero.mm import MmConfig

NO_FAULT: Final = 0
HALF: Final = 1  # part is dropped, nothing proven
BUSY: Final = 2  # part is dropped, then the call fails
UNTOUCHED: Final = 3  # nothing is dropped
FAULTS: Final = 3

NO_LIE: Final = 0
SAY_NOTHING: Final = 1  # the answer is withheld
SAY_LESS: Final = 2  # a page less than it was; of a bitmap the first byte only
SAY_LITTLE: Final = 3  # one byte
LEAVE_RUBBISH: Final = 4  # set bits where nothing was written
LIES: Final = 4


class Report(NamedTuple):
    """One block that the device was told of: where, how large, and whether it showed it to be zero."""

    pfn: int
    order: int
    shown: bool


class Host:
    """The other side of one machine, made to fail on request.

    Attributes:
        zero: pages that the host has shown to be zero, or an owner has, since they were last owned.
        told: pages that the device was told of as free since they were last owned.
        faults: what the next discards do, the last one first.
        lies: what the next answers are, the last one first.
        reorder: whether the next answers come in another order than the requests.
        silent: how many of the next notifications nobody hears.
        reports: what the device was told since the list was last emptied.
        granted: how many pages were shown to be zero since it was last set to 0, each time counted.
    """

    def __init__(self, pages: int) -> None:
        """Know nothing of any page yet."""
        self.zero = np.zeros(pages, dtype=np.bool_)
        self.told = np.zeros(pages, dtype=np.bool_)
        self.faults: list[int] = []
        self.lies: list[int] = []
        self.reorder = False
        self.silent = 0
        self.reports: list[Report] = []
        self.granted = 0
        self._proven: list[tuple[int, int]] = []
        self._failed = False

    def attach(self, machine: Machine) -> None:
        """Stand between a machine's memory, its device and its driver."""
        self.guest = machine.mm.config
        self.device = device = machine.device
        # What the guest may believe, worked out from what is offered and how the guest is built.
        fills = machine.mm.config.page_poisoning or machine.mm.config.want_init_on_free
        offered = device.config.offered
        reports = Feature.REPORTING in offered and (not fills or Feature.PAGE_POISON in offered)
        trusts = believes(machine.mm.config)
        self.trusted_lengths = trusts and reports and Feature.DEVICE_INIT_REPORTED in offered
        self.trusted_bitmaps = trusts and Feature.DEVICE_INIT_ON_INFLATE in offered
        handlers: Any = device._handlers
        self._report = handlers[QueueRole.REPORTING].handle
        self._inflate = handlers[QueueRole.INFLATE].handle
        handlers[QueueRole.REPORTING].handle = self.report
        handlers[QueueRole.INFLATE].handle = self.inflate
        self._notify = device.notify
        device.notify = self.notify  # type: ignore[method-assign]

    def watch(self, machine: Machine) -> None:
        """See every discard of a machine's memory."""
        self._discard = machine.memory.discard
        machine.memory.discard = self.discard  # type: ignore[method-assign]

    # What happens to pages in the guest.

    def owned(self, pfn: int, count: int) -> None:
        """Note that somebody had pages and may have written to them."""
        self.zero[pfn : pfn + count] = False
        self.told[pfn : pfn + count] = False

    def shown(self, pfn: int, count: int) -> None:
        """Note that an owner gives pages back of which it knows that they are zero."""
        self.zero[pfn : pfn + count] = True
        self.granted += count

    # What the device does.

    def discard(self, gpa: Gpa, length: int) -> bool:
        """Be a backing that fails at times."""
        fault = self.faults.pop() if self.faults else NO_FAULT
        if fault == NO_FAULT:
            done = bool(self._discard(gpa, length))
            if done:
                self._proven.append((gpa >> PAGE_SHIFT, (gpa + length) >> PAGE_SHIFT))
            self._failed |= not done
            return done
        self._failed = True
        if fault != UNTOUCHED:
            self._discard(gpa, length // 2 // PAGE_SIZE * PAGE_SIZE or PAGE_SIZE)
        if fault == BUSY:
            raise OSError("the backing is busy")
        return False

    def report(self, chain: Chain) -> int:
        """Serve one reported block, and answer as the host pleases."""
        self._proven.clear()
        self._failed = False
        used = int(self._report(chain))
        length = chain.writable_len
        told = used if not (lie := self._lie()) else _short(length, lie)
        shown = told == length and used == length and not self._failed and self.trusted_lengths
        for gpa, size in chain.writable:
            first, count = gpa >> PAGE_SHIFT, size >> PAGE_SHIFT
            self.told[first : first + count] = True
            proven = shown and self._covers(first, first + count)
            self.zero[first : first + count] = proven
            self.granted += count if proven else 0
            if count & (count - 1) == 0:
                self.reports.append(Report(first, count.bit_length() - 1, bool(self.zero[first])))
        return told

    def inflate(self, chain: Chain) -> int:
        """Serve one request to inflate, and answer as the host pleases."""
        self._proven.clear()
        used = int(self._inflate(chain))
        try:
            pfns = unpack_pfns(chain.read(chain.readable_len)).astype(np.int64)
        except (DeviceError, ValueError):
            return used
        pfns = pfns[pfns < len(self.zero)]
        self.zero[pfns] = False
        self.told[pfns] = False
        lie = self._lie()
        size = min((len(pfns) + 7) // 8, chain.writable_len)
        if not size or Feature.DEVICE_INIT_ON_INFLATE not in self.device.acked:
            return used
        bitmap = np.frombuffer(_read_writable(chain, self.device)[:size], dtype=np.uint8)
        answered = bitmap.copy()
        if lie in {SAY_NOTHING, LEAVE_RUBBISH}:
            used = 0
        elif lie in {SAY_LESS, SAY_LITTLE}:
            used = min(used, 1)
        if lie == LEAVE_RUBBISH:
            # The specification says nothing of bytes that the used length leaves out.
            _write_writable(chain, self.device, b"\xff" * size)
        bits = np.unpackbits(answered, bitorder="little")[: len(pfns)]
        bits[used * 8 :] = 0
        if self.trusted_bitmaps:
            for pfn in pfns[bits.astype(np.bool_)].tolist():
                self.zero[pfn] = self._covers(pfn, pfn + 1)
                self.granted += int(self.zero[pfn])
        return used

    def notify(self, index: int) -> None:
        """Serve a queue, or hear nothing, or answer in another order than was asked."""
        if self.silent:
            self.silent -= 1
            return
        server: Any = self.device._queues.get(index)
        if not self.reorder or server is None or server.role is not QueueRole.REPORTING:
            self._notify(index)
            return
        self.reorder = False
        queue, answers = server.queue, list[tuple[int, int]]()
        push, flush = queue.push, queue.flush

        def publish() -> bool:
            for head, used in reversed(answers):
                push(head, used)
            answers.clear()
            return bool(flush())

        queue.push, queue.flush = lambda head, used: answers.append((head, used)), publish
        try:
            self._notify(index)
        finally:
            del queue.push, queue.flush

    def _lie(self) -> int:
        return self.lies.pop() if self.lies else NO_LIE

    def _covers(self, first: int, end: int) -> bool:
        return any(low <= first and end <= high for low, high in self._proven)


def believes(guest: MmConfig) -> bool:
    """Return whether a guest is built to believe a device that says that pages are zero."""
    return not guest.page_poisoning and not guest.confidential


def _short(length: int, lie: int) -> int:
    if lie == SAY_LESS:
        return length - PAGE_SIZE
    return 1 if lie == SAY_LITTLE else 0


def _memory(device: Any) -> Any:
    return device._state.discarder.memory


def _read_writable(chain: Chain, device: Any) -> bytes:
    return b"".join(_memory(device).read(Gpa(gpa), size) for gpa, size in chain.writable)


def _write_writable(chain: Chain, device: Any, data: bytes) -> None:
    for gpa, size in chain.writable:
        _memory(device).write(Gpa(gpa), data[:size])
        data = data[size:]
