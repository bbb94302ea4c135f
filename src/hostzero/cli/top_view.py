# SPDX-License-Identifier: GPL-2.0-only
"""What ``hostzero top`` shows, made of two statuses and the time between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hostzero.cli.device_view import (
    QUEUES,
    Status,
    balloon_lines,
    errors_table,
    features_line,
    session_line,
    sizes_table,
    statistics_table,
)
from hostzero.render import NONE, data_size, new_table

_BAR_WIDTH: Final = 16


def render(status: Status, before: Status | None, seconds: float) -> RenderableType:
    """Return the whole view.

    Args:
        status: the status to show.
        before: the one before it; None for the first, which has no rates.
        seconds: the time between the two.
    """
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(sizes_table(status), statistics_table(status["statistics"]))
    return Group(
        *_head(status),
        "",
        _queues(status, before, seconds),
        "",
        errors_table(status),
        "",
        grid,
    )


def _head(status: Status) -> Iterator[RenderableType]:
    yield Text(session_line(status), style="bold", no_wrap=True, overflow="ellipsis")
    first, *rest = balloon_lines(status)
    memory = status["device"]["memory_bytes"]
    line = Table.grid(padding=(0, 1, 0, 0))
    if memory:
        given = min(status["device"]["actual_bytes"], memory)
        line.add_row(ProgressBar(total=memory, completed=given, width=_BAR_WIDTH), Text(first))
    else:
        line.add_row(Text(first))
    yield line
    for text in (*rest, features_line(status)):
        yield Text(text, no_wrap=True, overflow="ellipsis")


def _queues(status: Status, before: Status | None, seconds: float) -> Table:
    table = new_table("queue", "requests", "/s", "given back", "/s", "proven zero", "claimed", "claims")
    now = status["metrics"]["device"]
    then = None if before is None or seconds <= 0 else before["metrics"]["device"]
    for queue in QUEUES:
        counters = now[queue]

        def rate(name: str, queue: str = queue) -> float | None:
            return None if then is None else (now[queue][name] - then[queue][name]) / seconds

        requests, given = rate("requests"), rate("discarded_bytes")
        table.add_row(
            queue,
            f"{counters['requests']:,}",
            NONE if requests is None else f"{requests:,.0f}",
            data_size(counters["discarded_bytes"]),
            NONE if given is None else data_size(given),
            data_size(counters["proven_zero_bytes"]),
            data_size(counters["claimed_zero_bytes"]),
            f"{counters['claims']:,}",
        )
    return table
