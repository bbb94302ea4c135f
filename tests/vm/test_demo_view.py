# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io

from rich.console import Console

from hostzero.vm.demo import Look, Phase, Run
from hostzero.vm.demo_view import LineView, LiveView, open_view, print_run
from hostzero.vm.steps import MIB

PHASES = [
    Phase("boot", 5.04, Look(backed=200 * MIB), "Linux 7.2"),
    Phase("inflate to 1024 MiB", 9.5, Look(190 * MIB, 1024 * MIB, 1030 * MIB, 7 * MIB)),
]


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100), stream


def drive(view: LineView | LiveView) -> None:
    for phase in PHASES:
        view.begin(phase.name)
        view.look(0.5, Look(backed=77 * MIB))
        view.end(phase)


def test_a_pipe_gets_a_line_per_phase() -> None:
    shown, stream = console(terminal=False)
    with open_view(shown) as view:
        assert isinstance(view, LineView)
        drive(view)
    assert stream.getvalue() == "boot: 5.0 s, 200 MiB backed\ninflate to 1024 MiB: 9.5 s, 190 MiB backed\n"


def test_a_terminal_shows_the_present_moment() -> None:
    shown, stream = console(terminal=True)
    with open_view(shown) as view:
        assert isinstance(view, LiveView)
        drive(view)
    assert "77" in stream.getvalue()
    assert "1030" in stream.getvalue()


def test_a_run_as_a_table_with_notes() -> None:
    shown, stream = console(terminal=False)
    print_run(Run("tcg", "11.1.3", "7.2-cloud", [1, 6, 7], [1], PHASES), shown)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "QEMU 11.1.3, tcg; Linux 7.2-cloud. Sizes in MiB."
    (row,) = [line.split() for line in lines if line.startswith("inflate")]
    assert row[-5:] == ["9.5", "190", "1024", "1030", "7"]
    assert "boot: Linux 7.2" in lines
    assert lines[-1] == "bits offered 1, 6, 7; taken by the driver 1"
    print_run(Run("kvm", "11", "7"), shown)
    assert stream.getvalue().splitlines()[-1] == "bits offered none; taken by the driver none"
