# SPDX-License-Identifier: GPL-2.0-only
"""KVM or not, with a stand-in for QEMU and a file for /dev/kvm."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from hostzero.errors import UsageError
from hostzero.vm import accel
from hostzero.vm.accel import Accel, choose
from hostzero.vm.progress import Lines, Silent
from tests.vm.stand_in import prepared_with, write_qemu


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accel, "_KVM", device)
    return device


def test_emulation_is_not_questioned(tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q", mode="refuses"))
    assert choose(prepared, "tcg", Silent()) == Accel("tcg", "asked for")


def test_a_machine_without_kvm(kvm: Path, tmp_path: Path) -> None:
    kvm.unlink()
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q"))
    assert choose(prepared, "auto", Silent()) == Accel("tcg", f"there is no {kvm}")
    with pytest.raises(UsageError, match=r"KVM does not work here: there is no .*--accel tcg"):
        choose(prepared, "kvm", Silent())


def test_kvm_is_taken_where_a_guest_boots_and_the_trial_is_made_once(kvm: Path, tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q"))
    said = io.StringIO()
    assert choose(prepared, "auto", Lines(said)) == Accel("kvm")
    write_qemu(tmp_path / "q", mode="refuses")
    assert choose(prepared, "auto", Lines(said)) == Accel("kvm")
    assert said.getvalue().count("booting a guest under KVM") == 1


def test_a_trial_that_fails_is_the_reason_until_the_machine_boots_again(kvm: Path, tmp_path: Path) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "q", mode="refuses"))
    chosen = choose(prepared, "auto", Silent())
    assert chosen.name == "tcg"
    assert "nonsense: not a device" in chosen.why
    verdict = tmp_path / "accel.json"
    document = json.loads(verdict.read_text())
    write_qemu(tmp_path / "q")
    assert choose(prepared, "auto", Silent()) == chosen
    document["key"][0] = "another boot"
    verdict.write_text(json.dumps(document))
    assert choose(prepared, "auto", Silent()) == Accel("kvm")
