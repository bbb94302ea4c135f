# SPDX-License-Identifier: GPL-2.0-only
"""A slow, obvious twin of the page allocator: free lists are Python lists, flags are booleans.

Written from the behaviour of Linux 7.2 and of the series, not from `hostzero.mm`: where the
two differ, one of them is wrong. One zone, no highatomic reserves (a zone below 200 MiB has
none), no bad pages. What the host does to a free block is `host_discards`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

MAX_ORDER = 10
PAGEBLOCK_ORDER = 9
PAGEBLOCK = 1 << PAGEBLOCK_ORDER
PAGE = 4096

UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, CMA = range(5)
FALLBACKS = {
    UNMOVABLE: (RECLAIMABLE, MOVABLE),
    MOVABLE: (RECLAIMABLE, UNMOVABLE),
    RECLAIMABLE: (UNMOVABLE, MOVABLE),
}

ZERO, POISON, WRITTEN = 0, 0xAA, 0x5A
"""What a page holds: nothing but zeros, nothing but 0xAA, or somebody's bytes."""


@dataclass
class Request:
    """What an allocation asks for, in words instead of gfp bits."""

    order: int
    migratetype: int
    zero: bool = False
    compound: bool = False
    may_block: bool = True
    high: bool = False
    no_reserves: bool = False


@dataclass
class Block:
    """Free pages that lie on one list."""

    pfn: int
    order: int
    zeroed: bool = False
    reported: bool = False


@dataclass
class Owned:
    """Pages that somebody has."""

    pfn: int
    order: int
    compound: bool
    references: int = 1


@dataclass
class Config:
    """How the guest is booted; watermarks and per-CPU limits are given, not computed."""

    nr_pages: int
    nr_cpus: int
    watermark_min: int
    watermark_low: int
    batch: int
    high: int
    cma_blocks: int = 0
    init_on_alloc: bool = False
    init_on_free: bool = False
    page_poisoning: bool = False
    reporting_order: int | None = None


@dataclass
class Counters:
    """What the guest counts, by the names of `VM_DTYPE`."""

    pgalloc: int = 0
    pgfree: int = 0
    allocstall: int = 0
    alloc_fail: int = 0
    fallback_claims: int = 0
    fallback_steals: int = 0
    zeroed_bytes: int = 0
    known_zero_bytes: int = 0
    dropped_hint_bytes: int = 0
    nr_poison_errors: int = 0
    page_reporting_requests: int = 0
    page_reporting_state: int = 0


def has_cpu_list(order: int) -> bool:
    """Say whether per-CPU lists hold blocks of this order."""
    return order in {0, 1, 2, 3, PAGEBLOCK_ORDER}


def cpu_list(order: int, migratetype: int) -> int:
    """Return the index of a per-CPU list: three for each small order, two for huge pages."""
    if order == PAGEBLOCK_ORDER:
        return 13 if migratetype == MOVABLE else 12
    return 3 * order + migratetype


def order_of_list(index: int) -> int:
    """Return the order of the blocks on a per-CPU list."""
    return PAGEBLOCK_ORDER if index >= 12 else index // 3


@dataclass
class NaiveAllocator:
    """All free and owned pages of one zone, page 0 being the firmware's."""

    config: Config
    free: dict[tuple[int, int], list[Block]] = field(default_factory=lambda: defaultdict(list))
    parked: dict[tuple[int, int], list[Block]] = field(default_factory=lambda: defaultdict(list))
    deferred: list[Block] = field(default_factory=list)
    zone_locked: bool = False  # by whoever frees now; it defers what would need the lock
    lists_locked: bool = False
    owned: dict[int, Owned] = field(default_factory=dict)
    count: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        """Free everything but page 0 in the largest aligned pieces, each to the tail of its list."""
        blocks = self.config.nr_pages // PAGEBLOCK
        self.types = [MOVABLE] * (blocks - self.config.cma_blocks) + [CMA] * self.config.cma_blocks
        untouched = POISON if self.config.page_poisoning else ZERO
        self.contents = [ZERO] + [untouched] * (self.config.nr_pages - 1)
        self.mapped: set[int] = set()
        self.private: set[int] = set()
        pfn = 1
        while pfn < self.config.nr_pages:
            order = PAGEBLOCK_ORDER
            while pfn % (1 << order) or pfn + (1 << order) > self.config.nr_pages:
                order -= 1
            self.insert(Block(pfn, order), to_tail=True)
            pfn += 1 << order
        self.count = Counters()  # reporting is not on yet

    # ---- what is where

    def type_of(self, pfn: int) -> int:
        """Return the migrate type of a page's pageblock."""
        return self.types[pfn // PAGEBLOCK]

    def find(self, pfn: int, order: int) -> tuple[tuple[int, int], Block] | None:
        """Return the free block that starts at a page and has an order, with its list."""
        for key, blocks in self.free.items():
            for block in blocks:
                if (block.pfn, block.order) == (pfn, order):
                    return key, block
        return None

    def free_blocks(self) -> list[Block]:
        """Return all blocks on the buddy lists, by address."""
        return sorted((b for blocks in self.free.values() for b in blocks), key=lambda b: b.pfn)

    def nr_free_pages(self, *types: int) -> int:
        """Return how many pages the buddy lists hold, of some types or of all."""
        return sum(
            1 << b.order for (_, t), blocks in self.free.items() if not types or t in types for b in blocks
        )

    def parked_pages(self, cpu: int) -> int:
        """Return how many pages a CPU's lists hold."""
        return sum(1 << b.order for (c, _), blocks in self.parked.items() if c == cpu for b in blocks)

    # ---- the buddy lists

    def insert(self, block: Block, *, to_tail: bool) -> None:
        """Merge a block with its free buddies and put it on a list."""
        migratetype = self.type_of(block.pfn)
        while block.order < MAX_ORDER:
            found = self.find(block.pfn ^ (1 << block.order), block.order)
            if found is None:
                break
            key, buddy = found
            if block.order >= PAGEBLOCK_ORDER and key[1] != migratetype:
                if max(key[1], migratetype) > RECLAIMABLE:
                    break  # CMA and reserves stay apart from ordinary pageblocks
                self.types[buddy.pfn // PAGEBLOCK] = migratetype
            self.free[key].remove(buddy)
            block = Block(
                min(block.pfn, buddy.pfn),
                block.order + 1,
                zeroed=block.zeroed and buddy.zeroed,
                reported=False,
            )
        blocks = self.free[block.order, migratetype]
        if to_tail or self.merge_is_likely(block):
            blocks.append(block)
        else:
            blocks.insert(0, block)
        self.notify(block.order)

    def merge_is_likely(self, block: Block) -> bool:
        """Say whether the next larger block's buddy is free: then this block should rest."""
        if block.order >= MAX_ORDER - 1:
            return False
        merged = block.pfn - block.pfn % (2 << block.order)
        return self.find(merged ^ (2 << block.order), block.order + 1) is not None

    def notify(self, order: int) -> None:
        """Ask for a reporting pass after a free that ended at a large enough order."""
        if self.config.reporting_order is not None and order >= self.config.reporting_order:
            if self.count.page_reporting_state == 0:
                self.count.page_reporting_requests += 1
            self.count.page_reporting_state = 1

    def cut(self, block: Block, order: int, migratetype: int) -> Block:
        """Put the upper halves of a block that is off its list to the heads of lists, down to `order`."""
        while block.order > order:
            block.order -= 1
            upper = Block(block.pfn + (1 << block.order), block.order, block.zeroed, block.reported)
            self.free[upper.order, migratetype].insert(0, upper)
        return block

    def take_own(self, order: int, migratetype: int) -> Block | None:
        """Take the first block of the smallest sufficient order of one type."""
        for current in range(order, MAX_ORDER + 1):
            if self.free[current, migratetype]:
                return self.cut(self.free[current, migratetype].pop(0), order, migratetype)
        return None

    def fallback_of(self, order: int, migratetype: int) -> int | None:
        """Return the first other type that has a block of an order."""
        for other in FALLBACKS[migratetype]:
            if self.free[order, other]:
                return other
        return None

    def claim(self, order: int, migratetype: int) -> Block | None:
        """Take a block from the largest order of another type and keep its pageblock, if that is fair."""
        for current in range(MAX_ORDER, order - 1, -1):
            if migratetype == MOVABLE and current < PAGEBLOCK_ORDER // 2:
                return None
            other = self.fallback_of(current, migratetype)
            if other is None:
                continue
            first = self.free[current, other][0]
            if current >= PAGEBLOCK_ORDER:
                self.free[current, other].pop(0)
                for page in range(first.pfn, first.pfn + (1 << current), PAGEBLOCK):
                    self.types[page // PAGEBLOCK] = migratetype
                self.count.fallback_claims += 1
                return self.cut(first, order, migratetype)
            if self.most_is_ours(first.pfn // PAGEBLOCK, migratetype, other):
                self.retype(first.pfn // PAGEBLOCK, other, migratetype)
                taken = self.take_own(order, migratetype)
                if taken is not None:
                    self.count.fallback_claims += 1
                    return taken
        return None

    def most_is_ours(self, pageblock: int, wanted: int, other: int) -> bool:
        """Say whether half of a pageblock is free or of the kind that the requester allocates."""
        start = pageblock * PAGEBLOCK
        inside = range(start, start + PAGEBLOCK)
        free = sum(1 << b.order for b in self.free_blocks() if b.pfn in inside)
        movable = sum(1 for page in self.mapped if page in inside)
        if wanted == MOVABLE:
            alike = movable
        elif other == MOVABLE:
            alike = PAGEBLOCK - free - movable
        else:
            alike = 0
        return free + alike >= PAGEBLOCK // 2

    def retype(self, pageblock: int, old: int, new: int) -> None:
        """Give a pageblock to another type; its free blocks go to the tails of that type's lists."""
        inside = range(pageblock * PAGEBLOCK, (pageblock + 1) * PAGEBLOCK)
        for block in self.free_blocks():
            if block.pfn in inside:
                self.free[block.order, old].remove(block)
                self.free[block.order, new].append(block)
        self.types[pageblock] = new

    def steal(self, order: int, migratetype: int) -> Block | None:
        """Take the smallest sufficient block of another type, whose rest stays with that type."""
        for current in range(order, MAX_ORDER + 1):
            other = self.fallback_of(current, migratetype)
            if other is not None:
                self.count.fallback_steals += 1
                return self.cut(self.free[current, other].pop(0), order, other)
        return None

    def take(self, order: int, migratetype: int) -> Block | None:
        """Take a block by the rules: balance CMA, own type, CMA, claim, steal."""
        taken = None
        if migratetype == MOVABLE and self.nr_free_pages(CMA) > self.nr_free_pages() // 2:
            taken = self.take_own(order, CMA)
        taken = taken or self.take_own(order, migratetype)
        if migratetype == MOVABLE:
            taken = taken or self.take_own(order, CMA)
        return taken or self.claim(order, migratetype) or self.steal(order, migratetype)

    # ---- the per-CPU lists

    def take_parked(self, order: int, migratetype: int, cpu: int) -> Block | None:
        """Take a block from a CPU's list, which is filled from the buddy lists if it is empty."""
        blocks = self.parked[cpu, cpu_list(order, migratetype)]
        if not blocks:
            wanted = self.config.batch
            if order and wanted > 1:
                wanted = max(wanted >> order, 2)
            for _ in range(wanted):
                block = self.take(order, migratetype)
                if block is None:
                    break
                # Only a block on a buddy list is reported.
                blocks.append(Block(block.pfn, block.order, block.zeroed))
        return blocks.pop(0) if blocks else None

    def park(self, block: Block, cpu: int) -> None:
        """Put a freed block on a CPU's list and give back what is too much."""
        migratetype = self.type_of(block.pfn)
        index = cpu_list(block.order, MOVABLE if migratetype == CMA else migratetype)
        self.parked[cpu, index].insert(0, block)
        parked = self.parked_pages(cpu)
        if parked >= self.config.high and not self.zone_locked:
            self.unpark(cpu, max(self.config.batch, parked - self.config.high + self.config.batch), index)

    def unpark(self, cpu: int, pages: int, index: int) -> None:
        """Give at least so many pages back, oldest of each list first, list after list."""
        pages = min(pages, self.parked_pages(cpu))
        while pages > 0:
            blocks = self.parked[cpu, index]
            while blocks and pages > 0:
                block = blocks.pop()
                pages -= 1 << block.order
                self.insert(block, to_tail=False)
            index = (index + 1) % 14

    def drain(self) -> None:
        """Give all parked pages of all CPUs back."""
        for cpu in range(self.config.nr_cpus):
            self.unpark(cpu, self.parked_pages(cpu), 0)

    # ---- allocating and freeing

    def enough(self, request: Request, mark: int) -> bool:
        """Say whether the zone may go below what it holds, and holds a large enough block."""
        free = self.nr_free_pages() - ((1 << request.order) - 1)
        if request.migratetype != MOVABLE:
            free -= self.nr_free_pages(CMA)
        if free <= mark:
            return False
        usable = [UNMOVABLE, MOVABLE, RECLAIMABLE] + ([CMA] if request.migratetype == MOVABLE else [])
        return request.order == 0 or any(
            b.order >= request.order for (_, t), blocks in self.free.items() if t in usable for b in blocks
        )

    def attempt(self, request: Request, mark: int, cpu: int) -> Block | None:
        """Take a block if the watermark allows it."""
        if not self.enough(request, mark):
            return None
        block = None
        if has_cpu_list(request.order):
            block = self.take_parked(request.order, request.migratetype, cpu)
        return block or self.take(request.order, request.migratetype)

    def allocate(self, request: Request, cpu: int) -> Owned | None:
        """Allocate a block, as near to the reserves as the request may go."""
        block = self.attempt(request, self.config.watermark_low, cpu)
        if block is None:
            mark = self.config.watermark_min
            if request.high:
                mark -= mark // 2
                if not request.may_block and not request.no_reserves:
                    mark -= mark // 4
            block = self.attempt(request, mark, cpu)
            if block is None and request.may_block:
                self.count.allocstall += 1
                self.drain()
                block = self.attempt(request, mark, cpu)
        if block is None:
            self.count.alloc_fail += 1
            return None
        self.hand_out(block, request)
        owned = Owned(block.pfn, block.order, request.compound and block.order > 0)
        self.owned[owned.pfn] = owned
        return owned

    def hand_out(self, block: Block, request: Request) -> None:
        """Zero a block for its owner, unless it is known to be zero or nobody asked."""
        pages = range(block.pfn, block.pfn + (1 << block.order))
        self.count.pgalloc += len(pages)
        wanted = (request.zero or self.config.init_on_alloc) and not self.config.init_on_free
        if self.config.page_poisoning:
            self.count.nr_poison_errors += sum(self.contents[page] != POISON for page in pages)
        if block.zeroed and wanted:
            self.count.known_zero_bytes += len(pages) * PAGE
        elif block.zeroed:
            self.count.dropped_hint_bytes += len(pages) * PAGE
        elif wanted:
            self.fill(pages, ZERO)
            self.count.zeroed_bytes += len(pages) * PAGE

    def fill(self, pages: range, value: int) -> None:
        """Write to pages."""
        for page in pages:
            self.contents[page] = value

    def release(self, pfn: int, order: int, cpu: int, *, known_zero: bool) -> None:
        """Free pages that nobody has any more."""
        pages = range(pfn, pfn + (1 << order))
        self.count.pgfree += len(pages)
        self.private.difference_update(pages)
        self.mapped.difference_update(pages)
        if self.config.page_poisoning:
            self.fill(pages, POISON)
            known_zero = False
        if self.config.init_on_free and not known_zero:
            self.fill(pages, ZERO)
            self.count.zeroed_bytes += len(pages) * PAGE
        block = Block(pfn, order, known_zero)
        if has_cpu_list(order) and not self.lists_locked:
            self.park(block, cpu)
        elif self.zone_locked:
            self.deferred.append(block)
        else:
            while self.deferred:
                self.insert_large(self.deferred.pop())
            self.insert_large(block)

    def insert_large(self, block: Block) -> None:
        """Put a block on the lists pageblock by pageblock."""
        for part in range(block.pfn, block.pfn + (1 << block.order), PAGEBLOCK):
            self.insert(Block(part, min(block.order, PAGEBLOCK_ORDER), block.zeroed), to_tail=False)

    def drop(self, owned: Owned, cpu: int, *, known_zero: bool = False) -> bool:
        """Drop a reference to a folio or a single page; only the last one frees it."""
        owned.references -= 1
        if owned.references:
            return False
        del self.owned[owned.pfn]
        self.release(owned.pfn, owned.order, cpu, known_zero=known_zero)
        return True

    def free_pages(self, owned: Owned, cpu: int) -> bool:
        """Drop a reference to a block; if it is not compound, only its first page can stay."""
        if owned.references == 1 or owned.compound:
            return self.drop(owned, cpu)
        owned.references -= 1
        order, owned.order = owned.order, 0
        for part in reversed(range(order)):
            self.release(owned.pfn + (1 << part), part, cpu, known_zero=False)
        return False

    def host_discards(self, block: Block, *, zeroes: bool) -> None:
        """Mark a free block as reported; the host dropped its pages and may have said so."""
        block.reported = True
        if zeroes:
            self.fill(range(block.pfn, block.pfn + (1 << block.order)), ZERO)
            block.zeroed = True
