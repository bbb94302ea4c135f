# SPDX-License-Identifier: GPL-2.0-only
"""A recorded status in tables, and what is said about states that are out of the ordinary."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from hostzero.cli import device_view
from hostzero.device import DISCARD_SIZE_BOUNDS
from hostzero.render import data_size
from hostzero.virtio.features import QueueRole
from tests.vhost_user.control_status import recorded


@pytest.fixture
def status() -> dict[str, Any]:
    return recorded()


def text_of(show: Any, document: Any, width: int = 118) -> str:
    console = Console(file=StringIO(), width=width)
    show(document, console)
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    return shown


def test_the_classes_of_sizes_are_those_of_the_device() -> None:
    *bounded, last = device_view.SIZES
    assert bounded == [f"to {data_size(bound)}" for bound in DISCARD_SIZE_BOUNDS]
    assert last == "above"


def test_the_queues_are_those_of_the_device() -> None:
    assert list(device_view.QUEUES) == [role.value for role in QueueRole]


def test_errors_are_named_by_kind_and_only_if_there_are_any(status: dict[str, Any]) -> None:
    assert device_view.errors(status) == [
        ("malformed requests, inflate", 2),
        ("failed discards, reporting", 1),
        ("vhost-user, unknown", 1),
        ("control, refused", 1),
    ]
    assert device_view.skipped(status) == [("outside-ram", 8192)]


def test_a_device_without_errors_says_none(status: dict[str, Any]) -> None:
    device = status["metrics"]["device"]
    device["inflate"]["malformed"] = device["reporting"]["discard_failed"] = 0
    device["inflate"]["skipped_bytes"]["outside-ram"] = 0
    status["metrics"]["vhost_user"]["errors"]["unknown"] = 0
    status["metrics"]["control"]["errors"]["refused"] = 0
    table = device_view.errors_table(status)
    assert list(table.columns[0].cells) == ["none"]


def test_who_is_served(status: dict[str, Any]) -> None:
    line = device_view.session_line(status)
    assert line == ("device process 4242; VMM connected (process 4711); session running; driver running")
    status["session"] |= {"connected": False, "peer_pid": None, "state": "listening"}
    status["device"]["live"] = False
    assert device_view.session_line(status) == "device process 4242; no VMM; session listening; no driver"


def test_what_is_out_of_the_ordinary(status: dict[str, Any]) -> None:
    assert list(device_view.balloon_lines(status)) == [
        "balloon 310 MiB, to be 1 GiB; the guest has 2.70 GiB of 3 GiB"
    ]
    status["device"] |= {"discards_inhibited": True, "hint": "started", "live": False}
    lines = list(device_view.balloon_lines(status))
    assert lines[0].endswith("no driver is running, it is told when it starts")
    assert lines[1:] == [
        "discards are inhibited: nothing is given back to the host",
        "free page hinting: started",
    ]


def test_features_that_were_not_taken(status: dict[str, Any]) -> None:
    assert device_view.features_line(status).endswith(
        "; not taken: must-tell-host, free-page-hint, page-poison"
    )
    status["device"]["live"] = False
    assert device_view.features_line(status).startswith("features offered: must-tell-host, stats-vq")


def test_a_size_before_there_is_a_guest(status: dict[str, Any]) -> None:
    status["device"] |= {"memory_bytes": 0, "actual_bytes": 0, "target_bytes": 4096, "live": False}
    assert device_view.resized(status["device"]) == (
        "balloon 0 B, to be 4 KiB; no driver is running, it is told when it starts"
    )


def test_print_status(status: dict[str, Any]) -> None:
    shown = text_of(device_view.print_status, status)
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "3 reporting enabled 32 713 2.78 GiB 2.77 GiB" in rows
    assert "memfree 1.50 GiB" in rows
    assert "malformed requests, inflate 2" in rows
    status["session"]["queues"] = []
    status["statistics"] = {}
    assert "Queues" not in text_of(device_view.print_status, status)


def test_print_statistics_says_whether_they_are_fresh(status: dict[str, Any]) -> None:
    result = {"fresh": True, "statistics": status["statistics"]}
    assert "latest figures" not in text_of(device_view.print_statistics, result)
    assert "latest figures" in text_of(device_view.print_statistics, result | {"fresh": False})


def test_print_metrics_leaves_no_counter_out(status: dict[str, Any]) -> None:
    shown = text_of(device_view.print_metrics, status["metrics"])
    device = status["metrics"]["device"]
    names = [*device["inflate"], *(name for name in device if name not in device_view.QUEUES)]
    for name in names:
        if name not in {"discard_sizes", "skipped_bytes"}:
            assert f"{name} " in shown, name
    assert "skipped, partial-host-page" in shown
    assert "errors, invalid-argument" in shown
    assert "to 16 MiB" in shown
