# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.errors import VmError
from hostzero.vm.qemu import BINARY, Qemu, examine, on_this_machine, parse_version, unpacked
from tests.vm.stand_in import write_qemu


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)", (11, 1, "11.1.3")),
        ("QEMU emulator version 10.2", (10, 2, "10.2")),
        ("bash 5.2", None),
    ],
)
def test_versions(text: str, found: tuple[int, int, str] | None) -> None:
    assert parse_version(text) == found


def test_one_that_will_do_gets_its_version(tmp_path: Path) -> None:
    assert examine(Qemu((write_qemu(tmp_path / "q").argv[0],))).version == "99.1.0"


@pytest.mark.parametrize(
    ("version", "device", "why"),
    [
        ("10.1.9", "vhost-user-test-device-pci", "10.2 is the first"),
        ("11.0.0", "virtio-net-pci", "built without vhost-user-test-device-pci"),
    ],
)
def test_one_that_will_not_do_is_told_why(tmp_path: Path, version: str, device: str, why: str) -> None:
    with pytest.raises(VmError, match=why):
        examine(write_qemu(tmp_path / "q", version=version, device=device))


def test_a_program_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="does not run"):
        examine(Qemu((str(tmp_path / "nothing"),)))
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho something else\n")
    other.chmod(0o755)
    with pytest.raises(VmError, match="does not say which version"):
        examine(Qemu((str(other),)))


def test_the_machine_s_own_is_taken_only_if_it_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert on_this_machine() is None
    write_qemu(tmp_path / BINARY, version="7.2.0")
    assert on_this_machine() is None
    write_qemu(tmp_path / BINARY)
    found = on_this_machine()
    assert found is not None
    assert found.argv == (str(tmp_path / BINARY),)


def test_an_unpacked_one_is_run_by_its_own_loader(tmp_path: Path) -> None:
    qemu = unpacked(tmp_path)
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    assert qemu.argv[:3] == (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries))
    assert qemu.environment == {"QEMU_MODULE_DIR": str(libraries / "qemu")}
