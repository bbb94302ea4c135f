# SPDX-License-Identifier: GPL-2.0-only
"""QEMU's balloon as a target, with a stand-in for QEMU; tests_vm/ has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.conform import qtest
from hostzero.conform.case import Case
from hostzero.conform.judge import Level
from hostzero.conform.qemu import QemuConnection, QemuTarget, command_line
from hostzero.conform.result import Outcome
from hostzero.conform.run import run_case
from hostzero.conform.suite import select
from hostzero.conform.target import Ability, Connection
from hostzero.errors import UsageError
from hostzero.virtio.balloon import StatTag
from tests.conform.stand_in_qemu import VERSION, script

SOME = select(
    [
        "negotiate-reset",
        "stats-values",
        "report-gives-memory-back",
        "bit6-content",
        "config-change-notified",
        "notify-event",
    ]
)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_our_device_passes_behind_a_stand_in(tmp_path: Path, case: Case) -> None:
    result = run_case(QemuTarget(str(script(tmp_path))), case)
    assert result.outcome is Outcome.PASS, [*result.misses, *result.transcript]


def test_a_connection_is_what_the_contract_says(tmp_path: Path) -> None:
    program = script(tmp_path)
    target = QemuTarget(str(program), ["-name", "test"])
    assert target.name == f"qemu:{program}"
    with target.connect() as connection:
        assert isinstance(connection, Connection)
        assert set(connection.missing) == {Ability.HINT}
        assert connection.alive()
        assert connection.stats() == {}
        with pytest.raises(NotImplementedError, match="migrates"):
            connection.hint_start()
    assert target.describe() == {
        "device": f"virtio-balloon-pci of {VERSION}",
        "memory": "memfd",
        "interrupts": "MSI-X",
        "arguments": "-name test",
    }


def test_a_device_without_msix_says_nothing_about_its_queues(tmp_path: Path) -> None:
    target = QemuTarget(str(script(tmp_path, "old")))
    with target.connect() as connection:
        assert set(connection.missing) == {Ability.HINT, Ability.INTERRUPTS}
    assert target.describe()["interrupts"] == "INTx"


def test_a_device_that_dies_is_a_finding_with_its_last_words(tmp_path: Path) -> None:
    (case,) = select(["inflate-one"])
    result = run_case(QemuTarget(str(script(tmp_path, "die"))), case)
    assert result.outcome is Outcome.FAIL
    assert result.level is Level.SAFETY
    # The script's shell ends with the status that stands for SIGABRT.
    assert "QEMU ended (exit status 134)" in result.misses[0].text
    assert "Assertion `sane' failed." in result.misses[0].text


def test_a_device_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtest.Qtest.__init__, "__defaults__", (2.0,))
    (case,) = select(["inflate-one"])
    result = run_case(QemuTarget(str(script(tmp_path, "hang"))), case)
    assert result.outcome is Outcome.FAIL
    assert "does not answer 'writew" in result.misses[0].text


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    target = QemuTarget(str(script(tmp_path)))
    counts = []
    for _ in range(3):
        with target.connect():
            pass
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[1] == counts[2]


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("stranger", "does not say which version of QEMU it is"),
        ("bare", "was built without virtio-balloon-pci"),
    ],
)
def test_a_program_that_will_not_do(tmp_path: Path, mode: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        QemuTarget(str(script(tmp_path, mode)))


def test_a_machine_without_our_balloon_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1af4:1041, not 1af4:1045"):
        QemuTarget(str(script(tmp_path, "other"))).connect()


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such program"):
        QemuTarget(str(tmp_path / "nowhere"))


def test_the_command_line_asks_for_vectors_only_where_they_are_known() -> None:
    assert any(",vectors=6" in word for word in command_line("/ram"))
    assert not any("vectors" in word for word in command_line("/ram", vectors=False))
    assert command_line("/ram", more=["-name", "x"])[-2:] == ["-name", "x"]


def test_the_names_of_statistics_are_one_to_one() -> None:
    from hostzero.conform.qemu import STATISTICS

    assert sorted(STATISTICS.values()) == sorted(StatTag)
    assert QemuConnection.hint_stop is QemuConnection.hint_done
