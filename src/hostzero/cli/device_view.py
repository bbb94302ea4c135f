# SPDX-License-Identifier: GPL-2.0-only
"""What a device says, as tables: the parts that ``hostzero ctl`` prints and ``hostzero top`` redraws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from hostzero.render import NONE, data_size, new_table, print_note, print_table

Status = Mapping[str, Any]

QUEUES: Final = ("inflate", "deflate", "stats", "free-page", "reporting")
DISCARDING: Final = ("inflate", "free-page", "reporting")
"""The queues that drop memory."""

SIZES: Final = (
    "to 4 KiB",
    "to 32 KiB",
    "to 256 KiB",
    "to 2 MiB",
    "to 16 MiB",
    "to 128 MiB",
    "to 1 GiB",
    "above",
)
"""The classes of `hostzero.device.DISCARD_SIZE_BOUNDS` in words."""

_IN_BYTES: Final = frozenset({"swap_in", "swap_out", "memfree", "memtot", "avail", "caches"})
_COUNTERS: Final = (
    "requests",
    "malformed",
    "interrupts",
    "pfns",
    "runs",
    "discard_calls",
    "discard_failed",
    "claims",
)
_BYTES: Final = ("discarded_bytes", "proven_zero_bytes", "claimed_zero_bytes")


def resized(result: Status) -> str:
    """Return in words what a resize has led to so far."""
    target, actual = data_size(result["target_bytes"]), data_size(result["actual_bytes"])
    reached = result["target_bytes"] == result["actual_bytes"]
    said = f"balloon {actual}" if reached else f"balloon {actual}, to be {target}"
    if result["memory_bytes"]:
        said += f"; the guest has {data_size(result['guest_bytes'])} of {data_size(result['memory_bytes'])}"
    return said if result["live"] else f"{said}; no driver is running, it is told when it starts"


def session_line(status: Status) -> str:
    """Return in one line who is served."""
    session = status["session"]
    peer = f" (process {session['peer_pid']})" if session["peer_pid"] else ""
    vmm = f"VMM connected{peer}" if session["connected"] else "no VMM"
    driver = "driver running" if status["device"]["live"] else "no driver"
    return f"device process {status['pid']}; {vmm}; session {session['state']}; {driver}"


def balloon_lines(status: Status) -> Iterator[str]:
    """Return what the balloon has, and whatever is out of the ordinary."""
    device = status["device"]
    yield resized(device)
    if device["discards_inhibited"]:
        yield "discards are inhibited: nothing is given back to the host"
    if device["hint"] != "stopped":
        yield f"free page hinting: {device['hint']}"


def features_line(status: Status) -> str:
    """Return which features were taken, and which of those offered were not."""
    offered, acked = status["device"]["features_offered"], status["device"]["features_acked"]
    if not status["device"]["live"]:
        return f"features offered: {', '.join(offered)}"
    left = [name for name in offered if name not in acked]
    return f"features: {', '.join(acked)}" + (f"; not taken: {', '.join(left)}" if left else "")


def errors(status: Status) -> list[tuple[str, int]]:
    """Return everything that went wrong, by kind, with how often; kinds that did not happen are left out."""
    metrics = status["metrics"]
    device, vhost_user, control = metrics["device"], metrics["vhost_user"], metrics["control"]
    found = [(f"malformed requests, {queue}", device[queue]["malformed"]) for queue in QUEUES]
    found += [(f"failed discards, {queue}", device[queue]["discard_failed"]) for queue in DISCARDING]
    found += [
        ("broken queues", device["broken_queues"]),
        ("refused feature sets", device["refused_negotiations"]),
        ("bit 6 without reporting", device["orphan_init_reported"]),
    ]
    found += [(f"vhost-user, {kind}", count) for kind, count in vhost_user["errors"].items()]
    found += [(f"control, {kind}", count) for kind, count in control["errors"].items()]
    return [(kind, count) for kind, count in found if count]


def skipped(status: Status) -> list[tuple[str, int]]:
    """Return the bytes that were named and not discarded, by reason over all queues; no zeros."""
    device = status["metrics"]["device"]
    reasons = device["inflate"]["skipped_bytes"]
    totals = [(reason, sum(device[queue]["skipped_bytes"][reason] for queue in QUEUES)) for reason in reasons]
    return [(reason, length) for reason, length in totals if length]


def sizes_table(status: Status) -> Table:
    """Return the discards by size, for each queue that drops memory."""
    table = new_table("discards", *DISCARDING)
    counts = [status["metrics"]["device"][queue]["discard_sizes"] for queue in DISCARDING]
    for size, *row in zip(SIZES, *counts, strict=True):
        table.add_row(size, *(f"{count:,}" if count else NONE for count in row))
    return table


def statistics_table(statistics: Status) -> Table:
    """Return the guest's statistics, one a row."""
    table = new_table("guest statistics", "")
    for name, value in statistics.items():
        table.add_row(name, data_size(value) if name in _IN_BYTES else f"{value:,}")
    return table


def errors_table(status: Status) -> Table:
    """Return what went wrong, and what was not discarded."""
    table = new_table("errors", "")
    for kind, count in errors(status):
        table.add_row(kind, f"{count:,}")
    for reason, length in skipped(status):
        table.add_row(f"not discarded, {reason}", data_size(length))
    if not table.rows:
        table.add_row("none", "")
    return table


def print_status(status: Status, console: Console) -> None:
    """Print the answer to ``status``."""
    console.print(session_line(status), highlight=False, markup=False)
    for line in (*balloon_lines(status), features_line(status)):
        console.print(line, highlight=False, markup=False)
    console.print()
    table = new_table("queue", "role", "state", "entries", "requests", "discarded", "claimed zero", left=3)
    for queue in status["session"]["queues"]:
        counters = status["metrics"]["device"][queue["role"]]
        table.add_row(
            str(queue["index"]),
            queue["role"],
            queue["state"],
            f"{queue['size']:,}",
            f"{counters['requests']:,}",
            data_size(counters["discarded_bytes"]),
            data_size(counters["claimed_zero_bytes"]),
        )
    if table.rows:
        print_table(console, "Queues", table)
    if status["statistics"]:
        print_table(console, "Statistics", statistics_table(status["statistics"]))
    print_table(console, "Errors", errors_table(status))


def print_statistics(result: Status, console: Console) -> None:
    """Print the guest's statistics and whether they are new."""
    console.print(statistics_table(result["statistics"]))
    if not result["fresh"]:
        print_note(console, "The guest did not answer the question; these are its latest figures.")


def print_metrics(metrics: Status, console: Console) -> None:
    """Print every counter."""
    device = metrics["device"]
    table = new_table("counter", *QUEUES)
    for name in _COUNTERS:
        table.add_row(name, *(f"{device[queue][name]:,}" for queue in QUEUES))
    for name in _BYTES:
        table.add_row(name, *(data_size(device[queue][name]) for queue in QUEUES))
    for reason in device["inflate"]["skipped_bytes"]:
        lengths = (device[queue]["skipped_bytes"][reason] for queue in QUEUES)
        table.add_row(f"skipped, {reason}", *map(data_size, lengths))
    print_table(console, "Queues", table)
    print_table(console, "Discards by size", sizes_table({"metrics": metrics}))
    rest = {name: value for name, value in device.items() if name not in QUEUES}
    for title, counters in (
        ("Device", rest),
        ("vhost-user", metrics["vhost_user"]),
        ("Control socket", metrics["control"]),
    ):
        table = new_table("counter", "")
        for name, value in _flat(counters):
            table.add_row(name, data_size(value) if name.endswith("_bytes") else f"{value:,}")
        print_table(console, title, table)


def _flat(counters: Status) -> Iterator[tuple[str, int]]:
    for name, value in counters.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}, {kind}", count) for kind, count in value.items())
        else:
            yield name, value
