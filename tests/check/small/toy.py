# SPDX-License-Identifier: GPL-2.0-only
"""A tiny world for the tests of the exhaustive search: blocks of a few pages, allocated and freed.

Its rules are those of the real allocator; what can be done and what is wrong is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hostzero.check.recording import Step
from hostzero.check.small import explore
from hostzero.check.small.layout import NOT_NOW
from hostzero.check.violation import Violation
from hostzero.errors import VmBug
from hostzero.mm.buddy import FPI_NONE, FPI_ZEROED
from hostzero.mm.gfp import __GFP_ZERO as GFP_ZERO
from hostzero.mm.gfp import GFP_HIGHUSER_MOVABLE
from hostzero.mm.mm_init import build_memory
from hostzero.mm.mmzone import NO_PAGE, WORDS_PER_PAGE, Memory, ZoneSpec
from hostzero.mm.page_alloc import alloc_pages
from hostzero.mm.page_free import __free_frozen_pages as free_frozen_pages
from hostzero.mm.pcplist import drain_all_pages

ALLOC, FREE, DRAIN = 0, 1, 2
NAMES = ("alloc", "free", "drain")
DIRTY = 0x5A5A5A5A5A5A5A5A
MARKS = (0, 255, 511)
PLANTED = 100


class Scene(NamedTuple):
    """Who owns what."""

    owned: Any  # by page: order + 1 of the block that begins there and has an owner
    scratch: Any  # the number of steps ever done: no state


@dataclass(frozen=True)
class Setup:
    """A guest of the toy world.

    Attributes:
        pages: how many it has.
        orders: what can be allocated.
        wrong_at: a violation: so many blocks of order 0 with an owner at once.
        bug_at: an assertion of the product's own fails: the same.
        state_at: 1 for a violation that is only seen in a look at the whole state: page 0 has an owner.
    """

    pages: int = 4
    orders: tuple[int, ...] = (0, 1)
    wrong_at: int | None = None
    bug_at: int | None = None
    state_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "orders": list(self.orders)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Setup:
        return replace(cls(**fields), orders=tuple(fields["orders"]))


def new_guest(setup: Setup) -> tuple[Memory, Scene]:
    # A page boundary, as guest RAM has it; one page more than needed to find one.
    room = np.zeros((setup.pages + 1) * WORDS_PER_PAGE, dtype=np.uint64)
    first = -(room.ctypes.data // 8) % WORDS_PER_PAGE
    ram = room[first : first + setup.pages * WORDS_PER_PAGE]
    mem = build_memory(ram, (ZoneSpec("tiny", 0, setup.pages),), 1, 0, 0)
    for field in ("watermark_min", "watermark_low", "watermark_high"):
        mem.zone[field] = 0
    mem.pcp["high"] = 2
    mem.vm[0].debug_vm = 1
    limits = np.array([-1 if at is None else at for at in (setup.wrong_at, setup.bug_at, setup.state_at)])
    scene = Scene(np.zeros(setup.pages, dtype=np.int64), np.concatenate([[0], limits]))
    return mem, scene


def actions(setup: Setup) -> NDArray[np.int64]:
    rows = [[ALLOC, order, zero, 0] for order in setup.orders for zero in (0, 1)]
    rows += [[FREE, pfn, zero, 0] for pfn in range(setup.pages) for zero in (0, 1)]
    return np.array([*rows, [DRAIN, 0, 0, 0]], dtype=np.int64)


def _alloc(mem: Memory, scene: Scene, order: int, zero: int) -> int:
    gfp = GFP_HIGHUSER_MOVABLE | (GFP_ZERO if zero else 0)
    pfn = int(alloc_pages(mem, gfp, order, -1, 0, 0))
    if pfn == NO_PAGE:
        return 0  # and the per-CPU lists were drained: something has happened
    scene.owned[pfn] = order + 1
    for page in range(pfn, pfn + (1 << order)):
        for mark in MARKS:
            mem.ram[page * WORDS_PER_PAGE + mark] = DIRTY
    return 0


def _free(mem: Memory, scene: Scene, pfn: int, zero: int) -> int:
    if scene.owned[pfn] == 0:
        return NOT_NOW
    order = int(scene.owned[pfn]) - 1
    scene.owned[pfn] = 0
    if zero:
        for page in range(pfn, pfn + (1 << order)):
            mem.ram[page * WORDS_PER_PAGE : (page + 1) * WORDS_PER_PAGE] = 0
    mem.mem_map[pfn]._refcount = 0
    free_frozen_pages(mem, pfn, order, FPI_ZEROED if zero else FPI_NONE, 0)
    return 0


def act(mem: Memory, scene: Scene, op: int, a: int, b: int, c: int) -> int:
    if op == ALLOC:
        done = _alloc(mem, scene, int(a), int(b))
    elif op == FREE:
        done = _free(mem, scene, int(a), int(b))
    else:
        drain_all_pages(mem)
        done = 0
    scene.scratch[0] += 1
    singles = np.count_nonzero(scene.owned == 1)
    if done == 0 and singles == scene.scratch[2]:
        mem.vm[0].bug_pfn = 1
        raise VmBug("so many single pages")
    if done == 0 and singles == scene.scratch[1]:
        return PLANTED
    return done


def normal_form(mem: Memory, scene: Scene) -> None:
    """A scene is in its normal form already."""


def check_all(mem: Memory, scene: Scene) -> int:
    return PLANTED if scene.owned[0] == 1 == scene.scratch[3] else 0


def state_words(mem: Memory, scene: Scene) -> dict[str, Any]:
    return {"owned": range(len(scene.owned)), "scratch": ()}


def violation(mem: Memory, scene: Scene, code: int) -> Violation:
    assert code == PLANTED
    return Violation("corruption", "so many single pages have an owner")


def bug(mem: Memory, error: VmBug) -> Violation:
    return Violation("rot", str(error), pfn=int(mem.vm[0].bug_pfn))


def state_of(mem: Memory, scene: Scene, pfn: int) -> str:
    return "owned" if scene.owned[pfn] else "free"


def step_of(op: int, a: int, b: int, c: int) -> Step:
    return [NAMES[op], a, b]


def action_of(step: Step, setup: Setup) -> tuple[int, int, int, int]:
    return NAMES.index(step[0]), step[1], step[2], 0


rows = ()
setup_from_json = Setup.from_json

_loop = getattr(explore.expand, "py_func", explore.expand)
expand = FunctionType(
    _loop.__code__,
    {**vars(explore), "act": act, "check_all": check_all, "normal_form": normal_form},
    "expand",
)
"""The inner loop of the search with the toy's actions, never compiled."""
