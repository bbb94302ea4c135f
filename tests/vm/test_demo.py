# SPDX-License-Identifier: GPL-2.0-only
"""What `vm run` does to a guest, with a guest and a device that do as they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostzero.errors import VmError
from hostzero.units import PAGE_SIZE
from hostzero.vm import demo
from hostzero.vm.accel import Accel
from hostzero.vm.agent import Answer
from hostzero.vm.demo import Look, Phase, run_demo
from hostzero.vm.steps import MIB, wait_balloon_pages
from tests.vm.stand_in import prepared_with, write_qemu


class Machine:
    """A guest and its device in one: a number of backed bytes, and a balloon."""

    def __init__(self) -> None:
        self.backed = 200 * MIB
        self.balloon = 0
        self.updates = 0
        self.commands: list[str] = []
        self.pid = 1
        self.pages_off = 0
        self.agent = SimpleNamespace(start=self.start, finish=lambda seconds: Answer(0, ""))
        self.memory = SimpleNamespace(backed=lambda: self.backed)

    def start(self, command: str) -> None:
        self.commands.append(command)
        if "/mnt/dirty &&" in command:
            self.backed += demo.REPORT
        elif command == "rm /mnt/dirty":
            self.backed -= demo.REPORT

    def load_driver(self) -> None:
        self.commands.append("insmod")

    def acked_features(self, balloon: str) -> set[int]:
        return {1, 2, 5, 32}

    def balloon_pages(self) -> int:
        return self.balloon // PAGE_SIZE + self.pages_off

    def cpu_seconds(self) -> float:
        return 0.0

    def resize(self, balloon_bytes: int) -> None:
        self.balloon = balloon_bytes

    def actual(self) -> int:
        return self.balloon

    def request(self, command: str) -> dict[str, Any]:
        self.updates += 1
        return {"updates": self.updates - 1}

    def status(self) -> dict[str, Any]:
        device = {
            "inflate": {"discarded_bytes": 3, "claimed_zero_bytes": 0},
            "reporting": {},
            "stats_updates": self.updates,
        }
        return {
            "device": {"actual_bytes": self.balloon},
            "metrics": {"device": device},
            "statistics": {"memfree": 5 * MIB, "memtot": 9 * MIB},
        }


class Seen:
    """Who watches."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []

    def begin(self, phase: str) -> None:
        self.begun.append(phase)

    def look(self, seconds: float, look: Look) -> None:
        assert seconds >= 0

    def end(self, phase: Phase) -> None:
        self.ended.append(phase.name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    @contextmanager
    def started(*given: object) -> Iterator[tuple[Machine, Machine]]:
        yield made, made

    monkeypatch.setattr(demo, "guest_with_device", started)
    monkeypatch.setattr(demo, "offered_features", lambda guest, slot: {1, 2, 5, 6, 7, 32})
    monkeypatch.setattr(demo, "settle", lambda guest, busy, look: look())
    monkeypatch.setattr(demo, "dirty_and_free", lambda guest, size: None)
    monkeypatch.setattr(demo, "wait_balloon_pages", partial(wait_balloon_pages, seconds=0))
    return made


def test_every_phase_is_run_and_shown(machine: Machine, tmp_path: Path) -> None:
    seen = Seen()
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q"))
    run = run_demo(prepared, Accel("tcg"), seen)
    assert seen.begun == seen.ended == [phase.name for phase in run.phases]
    assert run.phases[1].note == "the guest sees bits 6 and 7; its driver does not take them"
    by_name = {phase.name: phase for phase in run.phases}
    assert by_name["write 512 MiB"].end.backed == 712 * MIB
    assert by_name["free 512 MiB"].end.backed == 200 * MIB
    assert by_name["inflate to 1024 MiB"].end.actual == 1024 * MIB
    assert by_name["deflate to 0"].end.actual == machine.balloon == 0
    assert run.statistics["memtot"] == 9 * MIB
    document = run.to_document()
    assert (document["kernel"], document["acked"]) == ("7.2.0-test", [1, 2, 5, 32])
    assert document["phases"][0]["end"] == {"backed": 200 * MIB, "actual": 0, "discarded": 3, "claimed": 0}


def test_a_balloon_that_is_not_exact_is_an_error(machine: Machine, tmp_path: Path) -> None:
    machine.pages_off = 1
    with pytest.raises(VmError, match="262144 pages in the balloon: not within 0 s: the guest counts 262145"):
        run_demo(prepared_with(tmp_path, write_qemu(tmp_path / "q")), Accel("tcg"), Seen())
