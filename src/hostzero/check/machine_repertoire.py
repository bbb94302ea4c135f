# SPDX-License-Identifier: GPL-2.0-only
"""What a drawn number stands for: one operation, or an episode. What comes out is plain steps.

Most guests do not do everything: each has a *repertoire*, a few episodes and the operations in them,
drawn anew for each guest. What one guest never does cannot come between what it does all the time,
and memory that is left alone by everybody else comes back to the same kind of use more often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hostzero.check.host import believes
from hostzero.check.machine_episodes import COMMON, EPISODES
from hostzero.check.machine_moves import ANY, BETWEEN, GROUPS, SAME, Move
from hostzero.check.world_setup import FEATURES, mm_config
from hostzero.virtio.features import Feature

if TYPE_CHECKING:
    from hostzero.check.machine_ops import Operation
    from hostzero.check.world import World

HALF: Final = 2
"""One move in so many is an episode."""
FEW: Final = 3
"""How many episodes a guest has that does not do everything."""
PLACES: Final = frozenset({"user", "which", "at", "length", "node", "order"})
"""Arguments that say where something is done; the same place is of more interest than another."""
EVERYTHING: Final = 4
"""One guest in so many does everything."""
ANYBODYS: Final = ("between", "look", "drop")
"""Groups of operations that every guest has."""
LITTLE: Final = 8
"""MiB of memory up to which a guest is filled quickly."""
OFTEN: Final = 8
"""How often an episode is there that needs something, where it is."""


def episodes_of(setup: dict[str, Any]) -> list[tuple[Move, ...]]:
    """Return the episodes that a guest can live, the common ones first, each as often as it is drawn."""
    able = list(COMMON)
    for (_, need), *episode in EPISODES[len(COMMON) :]:
        if has(setup, need):
            able += [tuple(episode)] * OFTEN
    return able


def has(setup: dict[str, Any], need: str) -> bool:
    """Return whether a guest has what an episode needs: one of `NEEDS`, or a part of the setup."""
    return NEEDS[need](setup) if need in NEEDS else bool(setup[need])


def _unchecked(setup: dict[str, Any]) -> bool:
    # Where pages are checked, an owner's flag would cost the page.
    return not any(setup[name] for name in ("debug_vm", "page_poisoning", "init_on_alloc", "init_on_free"))


def _believed_balloon(setup: dict[str, Any]) -> bool:
    offered = FEATURES[setup["features"]]
    return Feature.DEVICE_INIT_ON_INFLATE in offered and believes(mm_config(setup))


def _little_memory(setup: dict[str, Any]) -> bool:
    # Where there is more, compaction seldom comes past the one place that matters.
    return int(setup["mib"]) <= LITTLE


def _reports_to_another(setup: dict[str, Any]) -> bool:
    # A balloon that hears of free memory itself has been told of most of it.
    return Feature.REPORTING not in FEATURES[setup["features"]]


NEEDS: Final[dict[str, Callable[[dict[str, Any]], bool]]] = {
    "unchecked": _unchecked,
    "believed_balloon": _believed_balloon,
    "little_memory": _little_memory,
    "reports_to_another": _reports_to_another,
}
"""What an episode may need besides a part of the setup that is true."""


class Repertoire(NamedTuple):
    """What one guest does.

    Attributes:
        episodes: the episodes that are drawn from, each as often as it is drawn.
        names: the operations that are drawn alone, likewise.
        recent: the last value of each argument, by its name: the next thing is done at the same place
            about every other time.
    """

    episodes: list[tuple[Move, ...]]
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
    used |= {name for group in ANYBODYS for name, *_ in GROUPS[group]}
    return Repertoire(some, [name for name in names if name in used], {})


def _names_in(part: Move) -> Iterator[str]:
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
    table: dict[str, Operation], part: Move, source: random.Random, recent: dict[str, int]
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
        if wanted is SAME:
            value = min(recent.get(argument, 0), most)
        elif isinstance(wanted, tuple):
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
