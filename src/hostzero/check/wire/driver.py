# SPDX-License-Identifier: GPL-2.0-only
"""A hostile host in front of the balloon driver of a real small guest.

`DriverWorld` boots a guest of 4 MiB full of dirt, binds the real driver to a `FalseDevice`, and
checks after each step:

- nothing comes out of the driver but the errors that it documents, and no failed assertion;
- the driver reads only bytes that it gave the device to write;
- a block or page is marked as zero exactly if the device said so in the way that the negotiated
  features make a promise, and what is marked is zero;
- pages of the guest's users keep every byte, and a page allocated with zeros is zero;
- the driver accepts just the features that its guest can use;
- the work for one step is bounded;
- in the end, whatever happened, `remove` gives every page back and an honest device works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from hostzero.check.violation import Kind, Violated, Violation
from hostzero.check.wire.bounds import TakesForEver, bounded
from hostzero.check.wire.device_model import (
    INIT_ON_INFLATE,
    INIT_REPORTED,
    PAGE,
    PAGE_POISON,
    REPORTING,
    STATS_VQ,
    VERSION_1,
)
from hostzero.check.wire.driver_requests import free_pages, wrong_request, wrong_word
from hostzero.check.wire.false_device import FalseDevice
from hostzero.check.wire.features import wrong_feature
from hostzero.driver import State, VirtioBalloon
from hostzero.errors import HostzeroError, MmError, OutOfMemory, UsageError, VmBug
from hostzero.mm import MemoryManager, MmConfig
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE, GFP_ZERO
from hostzero.mm.page_flags import PG_zeroed, PGTY_buddy, PGTY_offline
from hostzero.mm.verify import verify_memory
from hostzero.ram import GuestMemory, open_ram
from hostzero.units import Gpa, Pfn

USERS_MAX: Final = 24
HISTORY: Final = 12
KEPT_ORDER: Final = 6
"""Blocks that rings are not made of while there are smaller ones, in pages as a power of two."""
FILL: Final = 0xA5

CHANGED: Final = "a configuration change"
CONFIG_READERS: Final = frozenset({CHANGED, "probe", "restore"})
"""Calls that read the configuration space and raise what goes wrong there to their caller."""

GUESTS: Final[dict[str, MmConfig]] = {
    "plain": MmConfig(),
    "confidential": MmConfig(confidential=True),
    "poisoning": MmConfig(page_poisoning=True),
    "init_on_free": MmConfig(init_on_free=True),
}

HONEST_FEATURES: Final = STATS_VQ | REPORTING | INIT_REPORTED | INIT_ON_INFLATE | PAGE_POISON | VERSION_1


class DriverWorld:
    """One guest, its driver, the device that lies to it, and the guest's users."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Boot the guest that `setup["guest"]` names in `GUESTS`, of `setup["mib"]` MiB or 4."""
        if setup["guest"] not in GUESTS:
            raise UsageError(f"the wire knows no guest {setup['guest']!r}")
        config = GUESTS[setup["guest"]]
        self.trusting = not (config.confidential or config.page_poisoning)
        mib = min(max(int(setup.get("mib", 4)), 4), 32)
        self.ram = open_ram(mib // 2 * (2 << 20))
        self.bytes = self.ram.array(np.uint8)
        self.bytes[:] = FILL
        self.mm = MemoryManager(self.ram, config)
        self.memory = GuestMemory.whole(self.ram)
        self.memory.read = self._read  # type: ignore[method-assign]
        self.device = FalseDevice(self.ram)
        self.device.on_request = lambda role, parsed, taken: wrong_request(
            self.mm, self.users, taken, role, parsed
        )
        # Such guests rely on what a reported page holds, and say so by PAGE_POISON.
        self.device.dirties = not (config.init_on_free or config.page_poisoning)
        self.driver = VirtioBalloon(self.mm, self.memory, self.device)
        self.violation: Violation | None = None
        self.done: list[list[Any]] = []
        self.users: list[tuple[int, int, int]] = []
        self.free_at_boot = self.mm.vm_stats().free_pages
        self.pages_at_boot = self.mm.vm_stats().total_pages
        self.leaks = False
        self._stamp = 0
        self._reported: set[int] = set()
        self._wrapped: object = None

    def close(self) -> None:
        """Give the memory back to the host."""
        self.ram.discard(0, self.ram.size)
        self.ram.close()

    def step(self, step: list[Any]) -> None:
        """Do one step and check everything.

        Raises:
            Violated: something does not hold.
            UsageError: there is no such step.
        """
        operation = OPERATIONS.get(step[0])
        if operation is None:
            raise UsageError(f"the wire has no step {step[0]!r}")
        self.done.append(step)
        self.device.calls = 0
        self.device.raised = False
        self.device.short_reads = 0
        operation(self, *step[1:])
        if step[0] not in {"lie", "fault"}:
            self._check()

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call the driver or the guest; errors that they document are swallowed."""
        result = None
        try:
            with bounded():
                result = function(*args)
            if self.device.short_reads and what in CONFIG_READERS:
                self.fail("rot", "a field that came back short is taken for a number")
        except Violated:
            raise
        except TakesForEver:
            self.fail("rot", f"the driver does not come back from {what}")
        except VmBug as error:
            self.fail("rot", f"an assertion of the guest fails at {what}", str(error))
        except (HostzeroError, OSError) as error:
            own = isinstance(error, HostzeroError)
            if not own and not self.device.raised:
                self.fail("rot", f"{type(error).__name__} comes out of the driver at {what}", str(error))
            if isinstance(error, UsageError):
                self.fail("rot", f"a user's error comes out of the driver at {what}", str(error))
        except Exception as error:  # noqa: BLE001 - whatever a host can cause here is what is looked for
            self.fail("rot", f"{type(error).__name__} comes out of the driver at {what}", str(error))
        if self.violation is not None:
            raise Violated(self.violation)
        self._wrap_report()
        return result

    def fail(self, kind: Kind, what: str, claim: str = "", **fields: Any) -> NoReturn:
        """Record and raise a violation."""
        history = tuple(str(step) for step in self.done[-HISTORY:])
        self.violation = self.violation or Violation(kind, what, claim=claim, history=history, **fields)
        raise Violated(self.violation)

    # ------------------------------------------------------------------ looking in from outside

    def _read(self, gpa: Gpa, length: int) -> bytes:
        given = self.device.given
        if length and not any(start <= gpa and gpa + length <= start + room for start, room in given):
            self.fail("rot", "the driver reads what it did not give the device to write", f"{length} bytes")
        return GuestMemory.read(self.memory, gpa, length)

    def _wrap_report(self) -> None:
        # The memory manager's call into the driver, seen from its side.
        reporting = self.driver.reporting
        if reporting is None or self._wrapped is reporting:
            return
        self._wrapped = reporting
        info = reporting.pr_dev_info
        report = info.report

        def watched(entries: Sequence[tuple[Pfn, int]]) -> None:
            self.device.said.clear()
            report(entries)
            believed = self.trusting and info.host_zeroes_pages
            for at, (pfn, order) in enumerate(entries):
                said = self.device.said.get(pfn * PAGE, False) and believed
                if bool(info.zeroed_bitmap[at]) and not said:
                    what = "a reported block counts as zero, and nobody promised that"
                    self.fail("corruption", what, pfn=int(pfn), order=order)
                if said and not info.zeroed_bitmap[at]:
                    what = "a reported block was promised to be zero and does not count"
                    self.fail("lost", what, pfn=int(pfn), order=order)

        info.report = watched

    def marked(self) -> list[tuple[int, int]]:
        """Return the blocks (first page, order) of the free lists and the balloon that claim to be zero."""
        pages = self.mm.mem.mem_map[: self.mm.nr_pages]
        (found,) = np.nonzero(pages["flags_f"].astype(np.int64) & PG_zeroed)
        blocks = []
        for pfn in found.tolist():
            kind = int(pages[pfn].page_type)
            if kind == PGTY_buddy:
                blocks.append((pfn, int(pages[pfn].private)))
            elif kind == PGTY_offline or int(pages[pfn]._refcount) == 0:
                blocks.append((pfn, 0))
        return blocks

    def _check(self) -> None:
        if self.device.wrong is not None:
            self.fail("corruption", self.device.wrong)
        for pfn, order in self.marked():
            block = self.bytes[pfn * PAGE : (pfn + (1 << order)) * PAGE]
            if block.any():
                first = int(np.flatnonzero(block)[0])
                what = "a page that the guest believes to be zero is not"
                wrong: dict[str, Any] = {"wrong_offset": first, "wrong_value": int(block[first])}
                self.fail("corruption", what, pfn=pfn, order=order, **wrong)
        if self.device.acked:
            wrong_choice = wrong_feature(self.device.offered_then, self.device.acked, self.mm.config)
            if wrong_choice is not None:
                kind, what = wrong_choice
                self.fail(kind, what, f"{self.device.acked:#x} of {self.device.offered_then:#x}")
        for pfn, order, stamp in self.users:
            block = self.bytes[pfn * PAGE : (pfn + (1 << order)) * PAGE]
            if (block != stamp).any():
                first = int(np.flatnonzero(block != stamp)[0])
                what = "a page of the guest's user has changed"
                wrong = {"wrong_offset": first, "wrong_value": int(block[first])}
                self.fail("corruption", what, pfn=pfn, order=order, **wrong)
        self._check_balloon()
        if self.driver.state is State.FAILED and self.device.rings and not self.leaks:
            self.fail("rot", "a device that failed was not reset")

        self._check_unreset()
        word = None
        if not self.leaks:
            word = wrong_word(self.driver, self.mm, self.pages_at_boot, self.device.written)
        if word is not None:
            self.fail("rot", word)

    def check_kept(self, known: set[tuple[int, int]]) -> None:
        """Check that free blocks which lay untouched are still known to be zero.

        That can be told where a driver came back with nothing in its balloon, and with memory to spare.
        """
        driver, pages = self.driver, self.mm.mem.mem_map[: self.mm.nr_pages]
        if driver.state is not State.ACTIVE or driver.num_pages or self.device.cmd_id or self.leaks:
            return
        if self.mm.vm_stats().free_pages < self.mm.nr_pages // 2:
            return
        for pfn, order in sorted(known - set(self.marked())):
            head = pages[pfn]
            if order >= KEPT_ORDER and head.page_type == PGTY_buddy and head.private == order:
                self.fail(
                    "lost",
                    "a block that lay untouched is not known to be zero any more",
                    pfn=pfn,
                    order=order,
                )

    def _check_unreset(self) -> None:
        pages = self.mm.mem.mem_map[: self.mm.nr_pages]
        for start, length in self.device.unreset:
            for pfn in range(start // PAGE, (start + length - 1) // PAGE + 1):
                free = bool(free_pages(self.mm, [pfn]))
                # On a per-CPU list; only the first page of a ring's block has a reference of its own.
                if start in self.device.unreset_rings:
                    free = free or pages[start // PAGE]._refcount == 0
                if free:
                    what = "a page is free that a device which did not reset may still write to"
                    self.fail("corruption", what, pfn=pfn)

    def _check_balloon(self) -> None:
        pages = self.mm.mem.mem_map[: self.mm.nr_pages]
        (balloon,) = np.nonzero(pages["page_type"] == PGTY_offline)
        usable = self.driver.state is State.ACTIVE and self.trusting
        for pfn in balloon.tolist():
            marked = bool(int(pages[pfn].flags_f) & PG_zeroed)
            said = self.device.claimed.get(pfn, False) and self.trusting
            if marked and not said:
                self.fail("corruption", "a balloon page counts as zero, and nobody promised that", pfn=pfn)
            if said and not marked and usable:
                self.fail("lost", "a balloon page was promised to be zero and does not count", pfn=pfn)

    # ------------------------------------------------------------------ the guest's users

    def allocate(self, order: int, *, zero: bool) -> None:
        """Allocate a block for a user, who fills it."""
        if len(self.users) >= USERS_MAX:
            return
        gfp = GFP_HIGHUSER_MOVABLE | (GFP_ZERO if zero else 0)

        def allocate() -> int | None:
            try:
                return int(self.mm.alloc_pages(gfp, order))
            except OutOfMemory:
                return None

        pfn = self.call("an allocation", allocate)
        if pfn is None:
            return
        block = self.bytes[pfn * PAGE : (pfn + (1 << order)) * PAGE]
        if zero and block.any():
            first = int(np.flatnonzero(block)[0])
            wrong: dict[str, Any] = {"wrong_offset": first, "wrong_value": int(block[first])}
            self.fail("corruption", "a page allocated as zero is not", pfn=pfn, order=order, **wrong)
        self._stamp = self._stamp % 255 + 1
        block[:] = self._stamp
        self.users.append((pfn, order, self._stamp))

    def hog(self, leave: int) -> None:
        """Take free memory for users, the largest blocks first, down to `leave` pages."""
        order = 9
        while order >= 0 and len(self.users) < USERS_MAX:
            owned = len(self.users)
            if self.mm.vm_stats().free_pages - (1 << order) >= leave:
                self.allocate(order, zero=False)
            order -= len(self.users) == owned

    def free(self, which: int) -> None:
        """Free the block of a user."""
        if self.users:
            pfn, order, _ = self.users.pop(which % len(self.users))
            self.call("a free", self.mm.free_pages, Pfn(pfn), order)

    def end(self) -> None:
        """Turn honest, remove the driver, and see that nothing is missing and a new one works."""
        device = self.device
        device.plan.clear()
        device.refuses_features = device.never_resets = False
        device.config_cut, device.raise_after = 4, 0
        device.num_pages = device.cmd_id = 0
        device.sizes = [128, 128, 128, 64, 32]
        if self.driver.state is not State.UNBOUND:
            self.call("remove", self.driver.remove)
        if self._state() is not State.UNBOUND:
            self.fail("rot", "a driver cannot be removed from a device that resets")
        self._check_pages("after remove")
        self._check()
        # Enough for rings and a small balloon, above all watermarks.
        while self.users and self.mm.vm_stats().free_pages < self.mm.nr_pages // 4:
            self.free(0)
        device.offered = HONEST_FEATURES
        device.num_pages = 8
        self.call("probe", self.driver.probe)
        if self._state() is not State.ACTIVE or self.driver.num_pages != 8:
            self.fail("rot", "an honest device does not get the balloon that it asks for")
        self._check()
        self.call("remove", self.driver.remove)
        self._check_pages("after an honest device")
        try:
            # Only the lists: what claims to be zero is read after every step.
            verify_memory(self.mm.mem, contents=False)
        except MmError as error:
            self.fail("rot", "the guest's lists are not sound in the end", str(error))

    def _state(self) -> State:
        # A call, because the type checker does not see that calls in between change it.
        return self.driver.state

    def _check_pages(self, when: str) -> None:
        owned = sum(1 << order for _, order, _ in self.users)
        missing = self.free_at_boot - owned - self.mm.vm_stats().free_pages
        if missing > 0 and not self.leaks:
            self.fail("rot", f"pages are missing {when}", f"{missing} pages")
        if missing < 0:
            self.fail("rot", f"pages are free that have owners {when}", f"{-missing} pages")


Operation = Callable[..., None]
OPERATIONS: Final[dict[str, Operation]] = {}
"""What a step may be, by name; `wire_driver_steps` fills it."""


def operation(function: Operation) -> Operation:
    """Make a function of a world and integers a step of its own name."""
    OPERATIONS[function.__name__] = function
    return function
