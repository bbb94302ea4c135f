# SPDX-License-Identifier: GPL-2.0-only
"""The processes of a search, and what each of them must read, wherever its pages are by now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hostzero.check.absent import first_wrong, wrong_bytes
from hostzero.check.inventory import OWNED, Inventory, folio_heads, found
from hostzero.mm import MemoryManager, Process
from hostzero.mm.hugetlbfs import HugetlbFile
from hostzero.mm.mmzone import NO_PAGE
from hostzero.mm.page_flags import PGTY_hugetlb

PRESENT: Final = 1
HUGE_ENTRY: Final = 0x80
HUGE_PAGES: Final = 512
FILE_PAGES: Final = 16 * HUGE_PAGES
"""More than a file of the search ever has."""


@dataclass
class File:
    """A hugetlb file, and what each of its pages of 4 KiB is full of."""

    file: HugetlbFile
    content: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(FILE_PAGES, dtype=np.uint8))


@dataclass
class Area:
    """A mapping, or what is left of one: pages `[start, end)`, and what each is full of."""

    start: int
    end: int
    content: NDArray[np.uint8]
    unit: int = 1  # pages that stay together
    file: File | None = None
    shared: bool = False  # a file, perhaps without a name, keeps the contents
    under: NDArray[np.uint8] | None = None  # what the file holds that a private mapping shows
    unknown: NDArray[np.bool_] | None = None  # of pages that need not be zero

    def part(self, first: int, end: int) -> Area:
        """Return what is left if only some pages stay; the content is the same memory."""
        pages = slice(first - self.start, end - self.start)
        under = None if self.under is None else self.under[pages]
        unknown = None if self.unknown is None else self.unknown[pages]
        return Area(first, end, self.content[pages], self.unit, self.file, self.shared, under, unknown)

    def wrote(self, first: int, end: int, content: NDArray[np.uint8] | int) -> None:
        """Note what each of some pages is full of now."""
        pages = slice(first - self.start, end - self.start)
        self.content[pages] = content
        if self.unknown is not None:
            self.unknown[pages] = False

    def dropped(self, first: int, end: int) -> None:
        """Note that some pages are gone, and that the next ones are fresh."""
        self.wrote(first, end, 0)
        if self.unknown is not None:
            self.unknown[first - self.start : end - self.start] = True

    def is_known(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return of each of some pages whether it is known what it holds."""
        if self.unknown is None:
            return np.ones(len(numbers), dtype=np.bool_)
        return ~self.unknown[numbers - self.start]


@dataclass
class User:
    """A process and what it has mapped."""

    process: Process
    number: int
    areas: list[Area] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)


@dataclass
class Mapped:
    """What the page tables of one process say.

    Attributes:
        numbers: page numbers, ascending.
        values: the entry of each; that of a huge page stands for all its pages.
        pfns: the page, or -1 where the entry is a slot of the swap area.
        slots: the slot, or -1.
        huge: whether a huge entry maps it.
    """

    numbers: NDArray[np.int64]
    pfns: NDArray[np.int64]
    slots: NDArray[np.int64]
    huge: NDArray[np.bool_]


def _entries(
    ram: Any, table: int, level: int, base: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bool]]:
    words = ram[table * 512 : table * 512 + 512]
    used = np.flatnonzero(words)
    if level == 3:
        if len(used):
            yield base + used, words[used].astype(np.int64), False
        return
    for i in used.tolist():
        value, number = int(words[i]), base + (i << (9 * (3 - level)))
        if level == 2 and value & HUGE_ENTRY:
            yield np.array([number]), np.array([value]), True
        else:
            yield from _entries(ram, (value % (1 << 52)) >> 12, level + 1, number)


def read_tables(mm: MemoryManager, process: Process) -> Mapped:
    """Walk a process's page tables in guest RAM."""
    numbers, values, huge = [], [], []
    for number, value, is_huge in _entries(mm.mem.ram, int(process._pgd), 0, 0):
        if is_huge:
            step = np.arange(HUGE_PAGES)
            numbers.append(int(number[0]) + step)
            values.append(int(value[0]) + (step << 12))
            huge.append(np.ones(HUGE_PAGES, dtype=np.bool_))
        else:
            numbers.append(number)
            values.append(value)
            huge.append(np.zeros(len(number), dtype=np.bool_))
    if not numbers:
        none = np.zeros(0, dtype=np.int64)
        return Mapped(none, none, none, np.zeros(0, dtype=np.bool_))
    value = np.concatenate(values)
    at = (value & ((1 << 52) - 1)) >> 12
    present = value & PRESENT != 0
    return Mapped(
        np.concatenate(numbers), np.where(present, at, -1), np.where(present, -1, at), np.concatenate(huge)
    )


class Contents:
    """Compares what is mapped with what must be read; collects what each page must hold."""

    def __init__(
        self, mm: MemoryManager, pages: Inventory, backed: NDArray[np.bool_], due: NDArray[np.bool_]
    ) -> None:
        self.mm, self.mem, self.pages, self.backed, self.due = mm, mm.mem, pages, backed, due
        self.zero_page = int(mm.mem.vm[0].empty_zero_page)
        self.pfns: list[NDArray[np.int64]] = []
        self.values: list[NDArray[np.uint8]] = []
        self.strange: list[NDArray[np.int64]] = []
        self.slots: list[NDArray[np.int64]] = []
        self.anonymous: list[NDArray[np.int64]] = []
        self.entries: list[NDArray[np.int64]] = []

    def block(self, pfn: int, order: int, value: int) -> None:
        """Expect a block to be full of a byte."""
        self.range(pfn, 1 << order, value)

    def range(self, pfn: int, pages: int, value: int) -> None:
        """Expect the same of a range of pages."""
        self.pfns.append(np.arange(pfn, pfn + pages))
        self.values.append(np.full(pages, value, dtype=np.uint8))

    def file(self, file: File) -> None:
        """Expect the pages of a file to hold its content."""
        size = 1 << file.file.order
        for index in np.flatnonzero(file.file.pages != NO_PAGE).tolist():
            self.pfns.append(int(file.file.pages[index]) + np.arange(size))
            self.values.append(file.content[index * size : (index + 1) * size])

    def user(self, user: User) -> None:
        """Expect what a process has mapped to hold what it wrote there."""
        mapped = read_tables(self.mm, user.process)
        seen = np.zeros(len(mapped.numbers), dtype=np.bool_)
        for area in user.areas:
            here = (mapped.numbers >= area.start) & (mapped.numbers < area.end)
            seen |= here
            numbers, pfns, slots = mapped.numbers[here], mapped.pfns[here], mapped.slots[here]
            self.follow(area, numbers, pfns)
            content = area.content[numbers - area.start]
            self.gone(user, area, numbers)
            zero = pfns == self.zero_page
            if content[zero].any():
                found(
                    "corruption",
                    "a process reads the zero page where it has written something else",
                    self.zero_page,
                )
            if area.unknown is not None:
                # What has been read as zero stays zero, whatever the mapping takes fresh pages for.
                area.unknown[numbers[zero] - area.start] = False
            known = area.is_known(numbers)
            present = (pfns >= 0) & ~zero
            self.pfns.append(pfns[present & known])
            self.values.append(content[present & known])
            self.strange.append(pfns[present & ~known])
            swapped = slots >= 0
            self.slots.append(slots[swapped])
            self.swapped(slots[swapped & known], content[swapped & known])
            if area.unit == 1:
                self.anonymous.append(pfns[present])
                self.places(user, numbers[present], pfns[present], mapped.huge[here][present])
        if not seen.all():
            found("rot", "a process has pages mapped outside of its mappings", int(mapped.pfns[~seen][0]))

    def follow(self, area: Area, numbers: NDArray[np.int64], pfns: NDArray[np.int64]) -> None:
        """A private mapping of a file shows the file, but for pages that are its own by now."""
        if area.file is None or area.under is None:
            return
        heads = folio_heads(self.mem, pfns)
        shown = np.ones(len(area.content), dtype=np.bool_)
        shown[numbers[~np.isin(heads, area.file.file.pages)] - area.start] = False
        area.content[shown] = area.under[shown]

    def gone(self, user: User, area: Area, numbers: NDArray[np.int64]) -> None:
        """See that what was written is somewhere."""
        if area.unit > 1 and (area.shared or area.under is not None):
            return  # a file keeps it
        written = np.flatnonzero(area.content) + area.start
        missing = np.setdiff1d(written, numbers, assume_unique=True)
        if any(page not in user.lost for page in missing.tolist()):
            found("corruption", "what a process wrote is neither mapped nor swapped out")

    def swapped(self, slots: NDArray[np.int64], content: NDArray[np.uint8]) -> None:
        """Compare pages in the swap area."""
        if wrong_bytes(self.mem.swap_area.view(np.uint64), slots, content).any():
            found("corruption", "a page in the swap area holds something else than was written")

    def places(
        self, user: User, numbers: NDArray[np.int64], pfns: NDArray[np.int64], huge: NDArray[np.bool_]
    ) -> None:
        """Compare the records of mapped pages with the tables that map them."""
        records = self.mem.mem_map
        heads = folio_heads(self.mem, pfns)
        keep = self.pages.types[heads] != PGTY_hugetlb
        numbers, pfns, heads, huge = numbers[keep], pfns[keep], heads[keep], huge[keep]
        bad = (
            (records["mapping"][heads] != user.process._mm_id)
            | (records["index"][heads] + pfns - heads != numbers)
            | (~huge & (records["_mapcount"][pfns] != 0))
        )
        if bad.any():
            found("rot", "a mapped page's record names another owner or place", int(pfns[np.argmax(bad)]))
        # A huge entry is one, and so are its pages together.
        self.entries.append(np.concatenate([heads[~huge], np.unique(heads[huge])]))

    def compare(self) -> None:
        """Compare all that was expected with RAM."""
        anonymous = np.concatenate(self.anonymous) if self.anonymous else np.zeros(0, dtype=np.int64)
        if len(np.unique(anonymous)) != len(anonymous):
            found("corruption", "a page is mapped twice, where it must be one owner's")
        heads, counts = np.unique(np.concatenate([anonymous[:0], *self.entries]), return_counts=True)
        bad = self.mem.mem_map["_refcount"][heads] != counts
        if bad.any():
            found("rot", "a mapped folio has not one reference for each entry", int(heads[np.argmax(bad)]))
        slots = np.concatenate(self.slots) if self.slots else np.zeros(0, dtype=np.int64)
        if len(np.unique(slots)) != len(slots) or len(slots) != np.count_nonzero(self.mem.swap_map):
            found("rot", "slots of the swap area are held by nobody, or twice")
        if not self.pfns:
            return
        pfns, values = np.concatenate(self.pfns), np.concatenate(self.values)
        held = np.concatenate([pfns, *self.strange])
        misplaced = self.pages.place[held] != OWNED
        if misplaced.any():
            at = int(held[np.argmax(misplaced)])
            found("corruption", "a page that somebody has is on a list of pages without an owner", at)
        if self.mm.config.dcache_aliasing:
            hidden = pfns[self.mem.kernel_lines[pfns] != 0]
            if len(hidden):
                what = "lines of the kernel's cache are left that will overwrite an owner's page"
                found("corruption", what, int(hidden[0]))
        wrong = np.zeros(len(pfns), dtype=np.bool_)
        backed = self.backed[pfns]
        wrong[~backed] = values[~backed] != 0
        words = self.mm.ram_bytes.view(np.uint64)
        read = backed & self.due[pfns]
        wrong[read] = wrong_bytes(words, pfns[read], values[read])
        if wrong.any():
            at = int(np.argmax(wrong))
            pfn, value = int(pfns[at]), int(values[at])
            offset, byte = first_wrong(words, pfn, value) if backed[at] else (0, 0)
            what = "an owner's page does not hold what was written to it"
            if value == 0:
                what = "a page that its owner was given as zero holds something else"
            found("corruption", what, pfn, where="an owner", wrong_offset=offset, wrong_value=byte)
