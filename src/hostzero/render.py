# SPDX-License-Identifier: GPL-2.0-only
"""What all tables share: how they look, and the room that they have."""

from __future__ import annotations

import os
import sys
from typing import Final

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

WIDE: Final = 118
"""A terminal with this many columns gets one table where a narrower one gets two."""

NOT_AVAILABLE: Final = "not available"
NONE: Final = "–"

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def open_console(*, to_stderr: bool) -> Console:
    """Return what tables are printed on: standard output, or standard error if a document goes there."""
    console = Console(file=sys.stderr if to_stderr else sys.stdout)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE  # a file has no width of its own; 80 would split the tables for nothing
    return console


def new_table(*columns: str, left: int = 1) -> Table:
    """Return an empty table whose first `left` columns are words and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        words = index < left
        table.add_column(column, justify="left" if words else "right", no_wrap=True, vertical="bottom")
    return table


def print_table(console: Console, title: str, table: Table) -> None:
    """Print a title, a table and an empty line."""
    # The title is a line of its own: rich would fold it to the table's width.
    console.print(title, style="bold", highlight=False)
    console.print(table)
    console.print()


def print_note(console: Console, text: str) -> None:
    """Print an indented paragraph."""
    console.print(Padding(text, (0, 0, 0, 2)), highlight=False)


def percent(value: float) -> str:
    """Return a share as per cent."""
    return f"{value * 100:.1f} %"


def data_size(size: float) -> str:
    """Return bytes in the unit that leaves one to four digits before the point, as in 1.17 MiB."""
    unit, step = "B", 0
    while size >= 1 << 10 and step < len(_UNITS):
        size, unit, step = size / (1 << 10), _UNITS[step], step + 1
    digits = 0 if unit == "B" or size >= 100 or size == int(size) else 1 if size >= 10 else 2
    return f"{size:.{digits}f} {unit}"
