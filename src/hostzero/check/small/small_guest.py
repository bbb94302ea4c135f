# SPDX-License-Identifier: GPL-2.0-only
"""Small guests: how they are made, which steps they have, and what is said of them in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from hostzero.check.recording import Step
from hostzero.check.small import layout, list_walk, step_codes, steps
from hostzero.check.small.layout import (
    CODE,
    EXPECTED,
    FOUND,
    MARK_REPORTED,
    MARK_ZEROED,
    NOW,
    NR_CTL,
    NR_PROBLEM,
    NR_ROWS,
    ORDER,
    PFN,
    PLACE,
    SETUP,
    WORD,
    Scene,
)
from hostzero.check.violation import Kind, Violation
from hostzero.errors import UsageError, VmBug
from hostzero.jit import link
from hostzero.mm.debug import describe_bug
from hostzero.mm.mm_init import build_memory
from hostzero.mm.mmzone import (
    MAX_PAGE_ORDER,
    MIGRATE_NAMES,
    MIGRATE_TYPES,
    NR_PAGE_ORDERS,
    NR_PCP_LISTS,
    WORDS_PER_PAGE,
    Memory,
    ZoneSpec,
)
from hostzero.units import PAGE_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BALLOON: Final = 64
MAX_CAPACITY: Final = 32
_DIRT: Final = 0x5A5A


@dataclass(frozen=True)
class Setup:
    """How a small guest is made.

    Attributes:
        pages: how many pages it has, in one zone.
        cpus: CPUs with lists of their own.
        dirty: whether all memory holds an earlier owner's bytes at boot.
        reporting_order: the smallest order that is reported.
        capacity: how many blocks a report takes.
        trust: whether the host's word is believed at boot (bit 6).
        page_hints: whether balloon pages may be marked (bit 7).
        balloon: how many pages the balloon takes at most.
        owners: how many blocks can be owned at once.
        max_order: the largest block that an owner asks for.
        poisoning, init_on_free, init_on_alloc, debug_vm, zero_aware: how the guest is booted.
        reclaim: whether an allocation may drain lists and compact before it fails.
        pcp_high, pcp_batch: how long a CPU's list grows, and how much it moves at once.
        watermark: pages that are kept back.
        actors: the operations that take part, by name; empty for all.
        kinds: the kinds of allocation that take part; empty for all.
        hows: the ways of freeing that take part; empty for all.
    """

    pages: int = 1024
    cpus: int = 1
    dirty: bool = True
    reporting_order: int = 2
    capacity: int = 4
    trust: bool = True
    page_hints: bool = True
    balloon: int = 8
    owners: int = 64
    max_order: int = 4
    poisoning: bool = False
    init_on_free: bool = False
    init_on_alloc: bool = False
    debug_vm: bool = True
    zero_aware: bool = False
    reclaim: bool = True
    pcp_high: int = 8
    pcp_batch: int = 2
    watermark: int = 0
    actors: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    hows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            UsageError: it is something else, or a guest that cannot be made.
        """
        known = {field.name: type(field.default) for field in fields(cls)}
        values = {
            name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
        }
        wrong = [
            name for name, value in values.items() if name not in known or type(value) is not known[name]
        ]
        if wrong:
            raise UsageError(f"the recording's setup is none of a small guest: {', '.join(sorted(wrong))}")
        setup = cls(**values)  # type: ignore[arg-type]
        setup.validate()
        return setup

    def validate(self) -> None:
        """Refuse what cannot be made.

        Raises:
            UsageError: with the field and what would fit.
        """
        limits = {
            "pages": (16, 1 << 20),
            "cpus": (1, layout.MAX_CPUS),
            "reporting_order": (0, MAX_PAGE_ORDER),
            "capacity": (1, MAX_CAPACITY),
            "balloon": (0, MAX_BALLOON),
            "owners": (1, 1 << 16),
            "max_order": (0, MAX_PAGE_ORDER),
            "pcp_high": (1, 1 << 16),
            "pcp_batch": (1, 1 << 10),
            "watermark": (0, 1 << 16),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} {getattr(self, name)}: must be from {low} to {high}")
        unknown = set(self.actors) - set(step_codes.NAMES)
        if unknown:
            raise UsageError(f"no operation of a small guest: {', '.join(sorted(unknown))}")


def new_guest(setup: Setup) -> tuple[Memory, Scene]:
    """Boot a small guest; every page is free."""
    ram = np.zeros((setup.pages + 1) * WORDS_PER_PAGE, dtype=np.uint64)
    skip = (-ram.ctypes.data % (1 << PAGE_SHIFT)) // 8  # pages are pages of the host too
    ram = ram[skip : skip + setup.pages * WORDS_PER_PAGE]
    mem = build_memory(ram, (ZoneSpec("Normal", 0, setup.pages),), setup.cpus, 0, 0)
    scene = Scene(
        ctl=_array(NR_CTL),
        problem=_array(NR_PROBLEM),
        shape=_array(2 * setup.pages),
        changed=_array(setup.pages),
        held=_array(setup.pages),
        source=_array(setup.pages),
        rel_pfn=_array(steps.NR_REL + MAX_CAPACITY),
        rel_order=_array(steps.NR_REL + MAX_CAPACITY),
        rel_zeroed=_array(steps.NR_REL + MAX_CAPACITY),
        rel_exact=_array(steps.NR_REL + MAX_CAPACITY),
        own_pfn=_array(setup.owners),
        own_order=_array(setup.owners),
        sg_pfn=_array(MAX_CAPACITY),
        sg_order=_array(MAX_CAPACITY),
        cursor=_array(2),
        zeroed=_array(MAX_CAPACITY),
        answered=_array(MAX_CAPACITY),
        flight=_array(MAX_BALLOON),
        flight_zeroed=_array(MAX_BALLOON),
        leaving=_array(MAX_BALLOON),
        leaving_zeroed=_array(MAX_BALLOON),
        one=_array(1),
        one_zeroed=_array(1),
        rows=_array(NR_ROWS),
        before=_array(4),
        tally=_array(layout.NR_TALLY),
    )
    link(mem, Scene=scene)
    configure(mem, scene, setup)
    return mem, scene


def configure(mem: Memory, scene: Scene, setup: Setup) -> None:
    """Turn a guest that has just booted into the one that `setup` describes."""
    vm = mem.vm[0]
    vm.debug_vm = int(setup.debug_vm)
    vm.page_poisoning = int(setup.poisoning)
    vm.init_on_free = int(setup.init_on_free and not setup.poisoning)
    vm.init_on_alloc = int(setup.init_on_alloc and not setup.poisoning)
    vm.placement = int(setup.zero_aware)
    vm.page_reporting_enabled = 1
    vm.page_reporting_order = setup.reporting_order
    # The driver withdraws bit 6 where free pages hold a pattern (patch 31).
    vm.page_reporting_host_zeroes = int(setup.trust and not setup.poisoning)
    zone = mem.zone[0]
    zone.watermark_min = setup.watermark
    zone.watermark_low = zone.watermark_high = 2 * setup.watermark
    zone.lowmem_reserve = 0
    for pcp in range(setup.cpus):
        mem.pcp[pcp].high = setup.pcp_high
        mem.pcp[pcp].batch = setup.pcp_batch
    ctl = scene.ctl
    ctl[layout.BATCH_START] = setup.capacity
    ctl[SETUP + step_codes.S_CAPACITY] = setup.capacity
    ctl[SETUP + step_codes.S_OWNERS] = setup.owners
    ctl[SETUP + step_codes.S_BALLOON] = setup.balloon
    ctl[SETUP + step_codes.S_PAGE_HINTS] = int(setup.page_hints and not setup.poisoning)
    ctl[SETUP + step_codes.S_RECLAIM] = int(setup.reclaim)
    if setup.poisoning:
        # As at boot in Linux: free memory holds the pattern.
        mem.ram[:] = np.uint64(0xAAAA_AAAA_AAAA_AAAA)
    elif setup.dirty and not setup.init_on_free:
        for word in (0, 255, 511):
            mem.ram[word::WORDS_PER_PAGE] = _DIRT
    ctl[layout.OVER_PFN] = -1
    code = list_walk.walk(mem, scene)
    if code != layout.DONE:
        raise VmBug(f"a guest that has just booted: {violation(mem, scene, int(code)).what}")


def _array(count: int) -> NDArray[np.int64]:
    return np.full(count, 0, dtype=np.int64)


def actions(setup: Setup) -> NDArray[np.int64]:
    """Return every action that may be possible at some time: rows of `op, a, b, c`."""
    orders = range(setup.max_order + 1)
    kinds = setup.kinds or tuple(range(16))
    hows = setup.hows or tuple(range(step_codes.NR_HOWS))
    cpus = range(setup.cpus)
    zeroes = (step_codes.FAILS, step_codes.ZEROES, step_codes.PARTLY)
    every: dict[int, list[tuple[int, int, int]]] = {
        step_codes.ALLOC: [(order, kind, cpu) for order in orders for kind in kinds for cpu in cpus],
        step_codes.FREE_BLOCK: [
            (slot, how, cpu) for slot in range(setup.owners) for how in hows for cpu in cpus
        ],
        step_codes.DRAIN: [(0, 0, 0)],
        step_codes.REPORT_FILL: [
            (order, migratetype, 0)
            for order in range(setup.reporting_order, NR_PAGE_ORDERS)
            if 1 << order <= setup.pages
            for migratetype in (0, 1)
        ],
        step_codes.REPORT_SEND: [(0, 0, 0)],
        step_codes.REPORT_ANSWER: [(entry, how, 0) for entry in range(setup.capacity) for how in zeroes],
        step_codes.REPORT_DRAIN: [(0, 0, 0), (1, 0, 0)],
        step_codes.BALLOON_TAKE: [(0, 0, cpu) for cpu in cpus],
        step_codes.BALLOON_ANSWER: [(entry, how, 0) for entry in range(setup.balloon) for how in zeroes],
        step_codes.BALLOON_ACK: [(0, 0, 0)],
        step_codes.BALLOON_LEAVE: [(0, 0, 0)],
        step_codes.BALLOON_FREE: [(0, 0, cpu) for cpu in cpus],
        step_codes.BREAK: [(pfn, 0, 0) for pfn in range(setup.pages)],
        step_codes.BREAK_HANDLE: [(0, 0, 0)],
        step_codes.BREAK_MEND: [(pfn, 0, 0) for pfn in range(setup.pages)],
        step_codes.HIBERNATE: [(0, 0, 0)],
        step_codes.TRUST: [(0, 0, 0), (1, 0, 0)],
        step_codes.ISOLATE: [(block, 0, 0) for block in range(setup.pages >> 9)],
        step_codes.UNISOLATE: [(block, 0, 0) for block in range(setup.pages >> 9)],
    }
    rows = [
        (op, *args)
        for op, choices in every.items()
        if not setup.actors or step_codes.NAMES[op] in setup.actors
        for args in choices
    ]
    return np.array(rows, dtype=np.int64)


_ARGUMENTS: Final = {
    step_codes.ALLOC: 3,
    step_codes.FREE_BLOCK: 3,
    step_codes.REPORT_FILL: 2,
    step_codes.REPORT_ANSWER: 2,
    step_codes.REPORT_DRAIN: 1,
    step_codes.BALLOON_ANSWER: 2,
    step_codes.BREAK: 1,
    step_codes.BREAK_MEND: 1,
    step_codes.TRUST: 1,
    step_codes.ISOLATE: 1,
    step_codes.UNISOLATE: 1,
}
_CPU_ONLY: Final = (step_codes.BALLOON_TAKE, step_codes.BALLOON_FREE)


def step_of(op: int, a: int, b: int, c: int) -> Step:
    """Return an action as a step of a recording."""
    if op in _CPU_ONLY:
        return [step_codes.NAMES[op], int(c)]
    return [step_codes.NAMES[op], *(int(value) for value in (a, b, c)[: _ARGUMENTS.get(op, 0)])]


def action_of(step: Step, setup: Setup) -> tuple[int, int, int, int]:
    """Return the action that a step of a recording stands for.

    Raises:
        UsageError: there is no such step in this guest.
    """
    name, *given = step
    if name not in step_codes.NAMES or not all(
        type(value) is int and 0 <= value < 1 << 20 for value in given
    ):
        raise UsageError(f"no step of a small guest: {step!r}")
    op = step_codes.NAMES.index(name)
    count = 1 if op in _CPU_ONLY else _ARGUMENTS.get(op, 0)
    if len(given) != count:
        raise UsageError(f"{name} takes {count} numbers: {step!r}")
    a, b, c = (0, 0, given[0]) if op in _CPU_ONLY else (*given, 0, 0, 0)[:3]
    if c >= setup.cpus or (op == step_codes.ALLOC and a > MAX_PAGE_ORDER):
        raise UsageError(f"there is no such CPU or order in this guest: {step!r}")
    return op, a, b, c


WHAT: Final[dict[int, tuple[Kind, str]]] = {
    layout.BAD_LINKS: ("rot", "a list's links do not match"),
    layout.BAD_BLOCK: ("rot", "a listed block has another type or order than its list, or is unaligned"),
    layout.TWICE: ("rot", "a page is on two lists, or listed and somebody's"),
    layout.DIRTY_RECORD: ("rot", "a listed page has flags, references or links of an owner"),
    layout.BAD_COUNT: ("rot", "a counter does not match its list"),
    layout.NOBODYS: ("rot", "a page comes from nowhere: it was on no list, and nobody gave it back"),
    layout.OWNED: ("rot", "a page on a list belongs to somebody"),
    layout.FALSE_ZERO: ("corruption", "a page that claims to be zero holds another byte"),
    layout.INVENTED: ("corruption", "a block claims to be zero and nobody has said so"),
    layout.FORGOTTEN: ("lost", "a block was known to be zero and is not any more"),
    layout.FALSELY_TOLD: ("rot", "a block counts as reported and the host has not been told of it"),
    layout.TOLD_AGAIN: ("lost", "the host was told of a block, and it counts as unreported"),
    layout.NOT_ZERO: ("corruption", "a page that was asked for as zero is not zero"),
    layout.OWNER_FLAGS: ("rot", "a page was given to an owner with flags, references or links on it"),
    layout.GIVEN_TWICE: ("corruption", "a page was given away that belongs to somebody"),
    layout.ZEROED_AGAIN: (
        "lost",
        "a page was zeroed that was known to be zero, or that nobody wanted zeroed",
    ),
    layout.BAD_PAGE: ("rot", "a page failed the allocator's own check (bad_page)"),
    layout.POISON: ("corruption", "a free page's poison pattern was overwritten"),
    layout.BROKEN_GIVEN: ("corruption", "a broken page was handed out"),
    layout.MISSING: ("rot", "a page is on no list and nobody's"),
    layout.WRONG_TYPE: ("rot", "a block is on the list of another migrate type than its pageblock's"),
    layout.NOT_ASKED: ("lost", "a large block came back, and page reporting was not asked for a pass"),
    layout.UNMERGED: ("rot", "two free buddies were not merged"),
}


def violation(mem: Memory, scene: Scene, code: int) -> Violation:
    """Return in words what `act` found."""
    kind, what = WHAT[code]
    problem = scene.problem
    pfn: int | None = int(problem[PFN])
    order: int | None = int(problem[ORDER])
    known = code == int(problem[CODE])
    claim = ""
    if code in {layout.INVENTED, layout.FORGOTTEN, layout.FALSELY_TOLD, layout.TOLD_AGAIN}:
        claim = f"expected {_marks(int(problem[EXPECTED]))}, found {_marks(int(problem[FOUND]))}"
    elif code == layout.FALSE_ZERO:
        claim = "known to be zero"
    elif code == layout.NOT_ZERO:
        claim = "asked for as zero"
    wrong_offset = wrong_value = None
    if known and int(problem[WORD]) >= 0 and pfn is not None:
        word = int(problem[WORD])
        value = int(mem.ram[word]).to_bytes(8, "little")
        at = next(i for i, byte in enumerate(value) if byte)
        wrong_offset = (word - pfn * WORDS_PER_PAGE) * 8 + at
        wrong_value = value[at]
    if pfn is None or not 0 <= pfn < int(mem.vm[0].nr_pages):
        pfn = order = None
    return Violation(
        kind,
        what,
        pfn=pfn,
        order=order,
        where=place_name(mem, int(problem[PLACE])),
        claim=claim,
        wrong_offset=wrong_offset,
        wrong_value=wrong_value,
    )


def bug(mem: Memory, error: VmBug) -> Violation:
    """Return a failed assertion of the allocator as a violation."""
    pfn = int(mem.vm[0].bug_pfn)
    known = 0 <= pfn < int(mem.vm[0].nr_pages)
    return Violation(
        "rot", str(error), pfn=pfn if known else None, where=describe_bug(mem, error) if known else ""
    )


def _marks(marks: int) -> str:
    said = [name for mark, name in ((MARK_ZEROED, "known zero"), (MARK_REPORTED, "reported")) if marks & mark]
    return " and ".join(said) or "no mark"


def place_name(mem: Memory, head: int) -> str:
    """Return what a list is called, by its head."""
    vm = mem.vm[0]
    nr_pages = int(vm.nr_pages)
    if head < nr_pages:
        return ""
    if head < int(vm.pcp_heads):
        order, migratetype = divmod(head - nr_pages, MIGRATE_TYPES)
        return f"free list of order {order}, {MIGRATE_NAMES[migratetype]}"
    if head < int(vm.hugetlb_heads):
        return f"CPU {(head - int(vm.pcp_heads)) // NR_PCP_LISTS}'s list"
    if head == int(vm.balloon_head):
        return "the balloon"
    if int(vm.trylock_heads) <= head < int(vm.compact_heads):
        return "the list of deferred frees"
    return f"list {head - nr_pages}"


_HOLDERS: Final = {
    step_codes.H_OWNER: "owned",
    step_codes.H_BATCH: "isolated for a report",
    step_codes.H_BALLOON: "in the balloon, or on its way out",
    step_codes.H_BROKEN: "broken, and out of use",
}


def state_of(mem: Memory, scene: Scene, pfn: int) -> str:
    """Return where a page is and what is said of it, as of the last step."""
    held = int(scene.held[pfn])
    head = int(layout.block_of(mem, scene, int(scene.ctl[NOW]), pfn))
    if head < 0:
        return _HOLDERS.get(held, "on no list")
    info = int(scene.shape[int(scene.ctl[NOW]) * int(mem.vm[0].nr_pages) + head])
    place = place_name(mem, info >> layout.PLACE_SHIFT)
    order = int(layout.order_of(info))
    part = "" if head == pfn else f", in the block {head:#x}"
    return f"{place}{part}, order {order}, {_marks(info)}"
