# SPDX-License-Identifier: GPL-2.0-only
"""What a drawn number stands for: one operation, or an episode, which is the use of one kind of memory.

Memory is of interest when it comes back: taken, written, given back, perhaps reported, taken again
and looked at. Single operations in any order seldom do that to the same kind of memory before
something else comes between. An episode is such a life, with everything in it left open that can
be; any two episodes and any operation may follow each other. What comes out is plain steps, and a
sequence of steps is all that is kept.

Most guests do not do everything: each has a *repertoire*, a few episodes and the operations in them,
drawn anew for each guest. What one guest never does cannot come between what it does all the time,
and memory that is left alone by everybody else comes back to the same kind of use more often.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from hostzero.check.machine_ops import Operation
    from hostzero.check.world import World

_Move = tuple[Any, ...]
"""An operation's name and what is known of its arguments: a number, numbers to choose from, or `ANY`."""

ANY: Final = None
HALF: Final = 2
"""One move in so many is an episode."""
FEW: Final = 3
"""How many episodes a guest has that does not do everything."""
PLACES: Final = frozenset({"user", "which", "at", "length", "node", "order"})
"""Arguments that say where something is done; the same place is of more interest than another."""
EVERYTHING: Final = 4
"""One guest in so many does everything."""

# What may happen between the two lives of a page, one of it or nothing.
_BETWEEN: Final[tuple[_Move, ...]] = (
    ("flush", 0),
    ("flush", ANY),
    ("balloon", ANY),
    ("drain",),
    ("compact",),
    ("hibernate",),
    ("suspend",),
    ("wait", ANY),
    ("evict_lines",),
)
BETWEEN: Final[_Move] = ("between",)

_LOOK: Final[tuple[_Move, ...]] = (
    ("populate", ANY, ANY, ANY),
    ("touch", ANY, ANY, ANY),
    ("read", ANY, ANY, ANY),
)
_DROP: Final[tuple[_Move, ...]] = (
    ("munmap", ANY, 0, ANY),
    ("dontneed", ANY, 0, ANY),
    ("dontneed", ANY, ANY, ANY),
    ("thin_out", ANY, ANY),
    ("exit_and_spawn", ANY),
)
# Memory that is whole, or what the episode before has left of it.
_START: Final[tuple[_Move, ...]] = (("settle",), ("settle",), ("drain",), ("exit_and_spawn", ANY))
START: Final[_Move] = ("start",)
LOOK: Final[_Move] = ("look",)
DROP: Final[_Move] = ("drop",)
_HOST: Final[tuple[_Move, ...]] = (
    ("host_fails", ANY, ANY, ANY),
    ("host_fails", 0, ANY, 0),
    ("host_lies", ANY, ANY, ANY),
    ("host_reorders",),
    ("inhibit", ANY),
)
HOST: Final[_Move] = ("host",)
GROUPS: Final = {"start": _START, "host": _HOST, "between": _BETWEEN, "look": _LOOK, "drop": _DROP}

_ALL: Final[tuple[tuple[_Move, ...], ...]] = (
    # what a process has: pages and huge pages, at any address
    (("mmap", ANY, (2, 3, 4, 5), 1), DROP, BETWEEN, ("mmap", ANY, ANY, (2, 3)), LOOK),
    (("flush", 0), ("mmap", ANY, (3, 4, 5), ANY), ("fill", ANY, ANY, ANY, ANY), DROP, ("mmap", ANY, ANY, 2)),
    (("mmap", ANY, ANY, 3), LOOK, LOOK, DROP, LOOK),
    (("flush", 0), ("mmap", ANY, (4, 5), 2), DROP, BETWEEN, ("mmap", ANY, (4, 5), (3, 4)), LOOK),
    # huge pages of memory that is whole
    (START, ("mmap", ANY, (4, 5), ANY), LOOK, DROP, BETWEEN, ("mmap", ANY, (4, 5), (2, 3, 4)), LOOK),
    # nearly all memory in small pages, some of them gone again, and larger blocks wanted
    (
        START,
        ("kernel_block", (0, 1, 2, 3), ANY, ANY, ANY, ANY),
        ("flush", ANY),
        ("crowd", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("kernel_block", 0, ANY, ANY, ANY, 0),
        ("kernel_block", (1, 2, 3, 4), ANY, ANY, ANY, 0),
        ("kernel_block", (1, 2, 3, 4, 5), ANY, ANY, ANY, ANY),
        LOOK,
    ),
    # no larger block is left, and of what comes back as zero only a part is wanted
    (
        START,
        ("crowd", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("exhaust", (2, 3, 4), ANY, ANY, ANY),
        ("free_kernel_block", ANY, 1),
        ("drain",),
        ("kernel_block", (0, 1, 2), 0, ANY, ANY, (4, 5)),
        ("exhaust", (1, 2, 3), ANY, ANY, ANY),
        ("free_kernel_block", ANY, ANY),
    ),
    # out to the swap area and back
    (
        ("needs", "swap_pages"),
        ("mmap", ANY, (1, 2, 3), 1),
        ("advise", ANY, 0, ANY, 0),
        BETWEEN,
        ("touch", ANY, (0, 1, 6), ANY),
        ("read", ANY, (0, 2), ANY),
        DROP,
    ),
    # a cgroup at its limit
    (
        ("flush", 0),
        ("limit", (1, 2, 3)),
        ("mmap", 1, (2, 3, 4), 0),
        ("populate", ANY, ANY, ANY),
        ("limit", 0),
        ("populate", ANY, ANY, ANY),
        LOOK,
    ),
    # huge pages: of the pool, beyond it, reserved, of a file
    (
        START,
        ("resize_pool", (1, 2), ANY),
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        ("fill", ANY, ANY, 4, ANY),
        ("munmap", ANY, 0, 5),
        BETWEEN,
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        LOOK,
        LOOK,
    ),
    (
        START,
        ("resize_pool", 0, (1, 2, 3)),
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        ("populate", ANY, ANY, ANY),
        ("fill", ANY, ANY, 4, ANY),
        DROP,
        BETWEEN,
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        LOOK,
    ),
    (
        START,
        ("resize_pool", (0, 1, 2), (1, 2, 3)),
        ("create_file", ANY),
        ("use_file", ANY, (0, 2), ANY, ANY),
        ("mmap_huge", ANY, ANY, ANY, 0, (0, 1)),
        ("fill", ANY, ANY, 4, ANY),
        ("use_file", ANY, (1, 3), 0, 1),
        BETWEEN,
        ("use_file", ANY, (0, 2), ANY, ANY),
        LOOK,
    ),
    (
        ("needs", "gigantic"),
        START,
        ("resize_gigantic_pool", (0, 0, 1), 1),
        ("mmap_huge", ANY, 0, (0, 1), 1, 5),
        LOOK,
        ("fill", ANY, ANY, 4, ANY),
        ("munmap", ANY, 0, 5),
        ("resize_gigantic_pool", ANY, ANY),
        ("mmap_huge", ANY, 0, ANY, 1, 5),
        LOOK,
    ),
    # ranges and CMA, out of memory that was written, or reported, or both
    (
        ("take_run", ANY, ANY, ANY, ANY, ANY),
        BETWEEN,
        ("give_runs_back", ANY),
        ("take_run", ANY, ANY, ANY, ANY, ANY),
    ),
    (
        ("needs", "cma"),
        ("mmap", ANY, (3, 4), 1),
        DROP,
        BETWEEN,
        ("take_from_cma", ANY, ANY),
        ("take_run", ANY, ANY, ANY, ANY, ANY),
        ("give_runs_back", ANY),
        ("take_from_cma", ANY, ANY),
    ),
    # the kernel's own
    (
        ("kernel_block", ANY, ANY, ANY, ANY, (0, 7)),
        BETWEEN,
        ("free_kernel_block", ANY, ANY),
        BETWEEN,
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    (("kernel_block", ANY, ANY, ANY, ANY, (2, 3, 8)), BETWEEN, ("mmap", ANY, ANY, 2), LOOK),
    (
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (4, 5)),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (4, 5, 6)),
        BETWEEN,
        ("kernel_block", (0, 1, 3), ANY, (1, 3), ANY, ANY),
        LOOK,
    ),
    # owners that leave their flags behind, where nobody looks
    (
        ("needs", "unchecked"),
        ("flush", ANY),
        ("kernel_block", ANY, ANY, ANY, ANY, (7, 9)),
        ("kernel_block", (0, 1, 2), ANY, ANY, ANY, 9),
        ("free_kernel_block", ANY, 0),
        ("take_run", ANY, ANY, ANY, ANY, 1),
        ("give_runs_back", ANY),
        ("mmap", ANY, ANY, (2, 3)),
        LOOK,
    ),
    # fragmented memory, and a large block wanted
    (
        ("mmap", ANY, (4, 5), (1, 2)),
        ("mmap", ANY, (4, 5), (1, 2)),
        ("balloon", ANY),
        ("thin_out", ANY, ANY),
        ("thin_out", ANY, ANY),
        ("kernel_block", (3, 8, 9), ANY, ANY, ANY, 8),
        ("kernel_block", (7, 8, 9, 10), ANY, (0, 3), ANY, 0),
        ("kernel_block", (8, 9), ANY, ANY, ANY, 0),
        ("compact",),
        LOOK,
    ),
    # the balloon
    (
        ("balloon", (2, 3, 4)),
        BETWEEN,
        ("migrate_balloon", ANY, ANY),
        ("balloon", 0),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    (
        HOST,
        ("balloon", (2, 3, 4)),
        HOST,
        ("migrate_balloon", ANY, ANY),
        HOST,
        ("balloon", (1, 2, 5)),
        BETWEEN,
        ("balloon", (0, 1)),
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    # a host that fails
    (
        ("mmap", ANY, (3, 4), 1),
        ("munmap", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("host_fails", ANY, ANY, ANY),
        HOST,
        HOST,
        ("flush", 0),
        HOST,
        ("flush", 0),
        ("mmap", ANY, ANY, 2),
    ),
    (("foreign_reports", ANY, ANY, ANY, ANY, ANY), ("mmap", ANY, ANY, 2), LOOK, ("flush", 0)),
    # marks in every place, and sleep
    (
        ("flush", 0),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (2, 4, 5)),
        ("kernel_block", (0, 1, 3, 9), ANY, ANY, ANY, 8),
        ("balloon", ANY),
        (("hibernate", "suspend", "reset_device"),),
        ("balloon", ANY),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    # what was only read so far is written
    (("mmap", ANY, (0, 1, 2), 0), ("read", ANY, 0, ANY), BETWEEN, ("touch", ANY, 0, ANY), DROP, LOOK),
    # memory that breaks, also under an owner who goes on, and goes
    (
        ("kernel_block", (0, 0, 1, 3), ANY, ANY, ANY, (0, 7)),
        ("break_page", ANY, 4),
        ("free_kernel_block", ANY, 0),
        BETWEEN,
        ("repair_page", ANY),
        BETWEEN,
        ("kernel_block", (0, 1), ANY, (1, 3), ANY, ANY),
        LOOK,
    ),
    (
        ("flush", 0),
        ("mmap", ANY, ANY, (1, 2)),
        ("break_page", ANY, ANY),
        ("break_page", ANY, (2, 3)),
        ("mmap", ANY, (1, 2), (1, 2)),
        BETWEEN,
        ("repair_page", ANY),
        BETWEEN,
        ("mmap", ANY, ANY, ANY),
        LOOK,
    ),
)
EPISODES: Final = tuple(sorted(_ALL, key=lambda episode: episode[0][0] == "needs"))
"""Lives of each kind of memory; those that need something of the guest are at the end."""
COMMON: Final = tuple(episode for episode in EPISODES if episode[0][0] != "needs")
OFTEN: Final = 8
"""How often an episode is there that needs something, where it is."""


def episodes_of(setup: dict[str, Any]) -> list[tuple[_Move, ...]]:
    """Return the episodes that a guest can live, the common ones first, each as often as it is drawn."""
    able = list(COMMON)
    for (_, need), *episode in EPISODES[len(COMMON) :]:
        if has(setup, need):
            able += [tuple(episode)] * OFTEN
    return able


def has(setup: dict[str, Any], need: str) -> bool:
    """Return whether a guest has what an episode needs."""
    if need == "unchecked":
        # Where pages are checked, an owner's flag would cost the page.
        return not any(
            setup[name] for name in ("debug_vm", "page_poisoning", "init_on_alloc", "init_on_free")
        )
    return bool(setup[need])


class Repertoire(NamedTuple):
    """What one guest does.

    Attributes:
        episodes: the episodes that are drawn from, each as often as it is drawn.
        names: the operations that are drawn alone, likewise.
        recent: the last value of each argument, by its name: the next thing is done at the same place
            about every other time.
    """

    episodes: list[tuple[_Move, ...]]
    names: list[str]
    recent: dict[str, int]


def repertoire(setup: dict[str, Any], table: dict[str, Operation], theme: int) -> Repertoire:
    """Return what a guest does.

    Args:
        setup: the guest's.
        table: the operations that there are.
        theme: a drawn number; one in `EVERYTHING` of them stands for all that there is.
    """
    episodes = episodes_of(setup)
    names = [name for name, op in table.items() for _ in range(op.weight)]
    if theme % EVERYTHING == 0:
        return Repertoire(episodes, names, {})
    source = random.Random(theme)
    # A common one is there once, one that needs something often, so the rare ones are seen where they can be.
    some = source.sample(episodes, min(FEW, len(episodes)))
    used = {name for episode in some for part in episode for name in _names_in(part)}
    used |= {name for group in (_BETWEEN, _LOOK, _DROP) for name, *_ in group}
    return Repertoire(some, [name for name in names if name in used], {})


def _names_in(part: _Move) -> Iterator[str]:
    if part[0] in GROUPS:
        yield from (name for name, *_ in GROUPS[part[0]])
    elif isinstance(part[0], tuple):
        yield from part[0]
    else:
        yield part[0]


def steps_of(
    world: World,
    table: dict[str, Operation],
    does: Repertoire,
    move: int,
    *,
    first: int | None = None,
) -> Iterator[list[Any]]:
    """Yield the steps that a drawn number stands for; each is looked for when the one before is done.

    Args:
        world: where they are done.
        table: the operations that there are.
        does: what this guest does.
        move: the drawn number.
        first: not drawn is what a guest begins with, when its memory is in large blocks: that
            which it can do and others cannot, or else the episode with this number.
    """
    source = random.Random(move)
    if first is not None or source.randrange(HALF):
        able = does.episodes
        if first is not None:
            able = episodes_of(world.setup)[len(COMMON) :] or [COMMON[first % len(COMMON)]]
        for part in source.choice(able):
            step = _step(table, part, source, does.recent)
            if step is not None and table[step[0]].when(world):
                yield step
        return
    names = [name for name in does.names if table[name].when(world)]
    if names:
        yield _filled(table[source.choice(names)], (), source, does.recent)


def _step(
    table: dict[str, Operation], part: _Move, source: random.Random, recent: dict[str, int]
) -> list[Any] | None:
    if part[0] in GROUPS:
        if part is BETWEEN and not source.randrange(3):
            return None
        part = source.choice(GROUPS[part[0]])
    name = source.choice(part[0]) if isinstance(part[0], tuple) else part[0]
    # A search that was given fewer operations has shorter episodes.
    return _filled(table[name], part[1:], source, recent) if name in table else None


def _filled(
    op: Operation, known: tuple[Any, ...], source: random.Random, recent: dict[str, int]
) -> list[Any]:
    step: list[Any] = [op.name]
    same = bool(source.randrange(HALF))
    for at, (argument, most) in enumerate(zip(op.names, op.most, strict=True)):
        wanted = known[at] if at < len(known) else ANY
        if isinstance(wanted, tuple):
            value = source.choice(wanted)
        elif wanted is not ANY:
            value = wanted
        elif same and argument in PLACES and argument in recent:
            value = min(recent[argument], most)
        else:
            value = source.randint(0, most)
        recent[argument] = value
        step.append(value)
    return step
