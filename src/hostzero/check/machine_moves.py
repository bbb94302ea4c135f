# SPDX-License-Identifier: GPL-2.0-only
"""Moves: what a part of an episode says, and groups of operations of which any may stand there."""

from __future__ import annotations

from typing import Any, Final

Move = tuple[Any, ...]
"""An operation's name and what is known of its arguments: a number, some to choose from, `ANY` or `SAME`."""

ANY: Final = None
SAME: Final = "same"
"""What the last operation that has an argument of this name had."""

# What may happen between the two lives of a page, one of it or nothing.
_BETWEEN: Final[tuple[Move, ...]] = (
    ("flush", 0),
    ("flush", ANY),
    ("balloon", ANY),
    ("drain",),
    ("compact",),
    ("hibernate",),
    ("suspend",),
    ("wait", ANY),
    ("evict_lines",),
    ("stain", ANY),
    ("stain", ANY),
)
BETWEEN: Final[Move] = ("between",)

_LOOK: Final[tuple[Move, ...]] = (
    ("populate", ANY, ANY, ANY),
    ("touch", ANY, ANY, ANY),
    ("read", ANY, ANY, ANY),
)
_DROP: Final[tuple[Move, ...]] = (
    ("munmap", ANY, 0, ANY),
    ("dontneed", ANY, 0, ANY),
    ("dontneed", ANY, ANY, ANY),
    ("thin_out", ANY, ANY),
    ("exit_and_spawn", ANY),
)
# Memory that is whole, or what the episode before has left of it.
_START: Final[tuple[Move, ...]] = (
    ("settle",),
    ("settle",),
    ("drain",),
    ("stain", ANY),
    ("exit_and_spawn", ANY),
)
START: Final[Move] = ("start",)
LOOK: Final[Move] = ("look",)
DROP: Final[Move] = ("drop",)
_HOST: Final[tuple[Move, ...]] = (
    ("host_fails", ANY, ANY, ANY),
    ("host_fails", 0, ANY, 0),
    ("host_lies", ANY, ANY, ANY),
    ("host_reorders",),
    ("inhibit", ANY),
)
HOST: Final[Move] = ("host",)
GROUPS: Final = {"start": _START, "host": _HOST, "between": _BETWEEN, "look": _LOOK, "drop": _DROP}
