# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.errors import UsageError, VmError
from hostzero.vm.apt import (
    Package,
    PrivateApt,
    find_keyring,
    network_settings,
    parse_installs,
    parse_mirror,
    parse_records,
    require_tools,
)
from hostzero.vm.progress import Silent
from tests.vm.debian import Debian


def test_the_mirror_is_the_one_that_is_debian_s_own() -> None:
    security = "'http://a.example/debian-security/dists/sid/InRelease' x"
    assert parse_mirror(security) is None
    assert (
        parse_mirror(f"{security}\n'https://b.example/debian/dists/sid/InRelease' y")
        == "https://b.example/debian"
    )


def test_what_a_simulation_would_install() -> None:
    text = (
        "Reading\nInst libc6 (2.43-7 Debian:unstable [amd64])\nConf libc6 (2.43-7 Debian:unstable [amd64])\n"
    )
    assert parse_installs(text) == [("libc6", "2.43-7")]


def test_records_with_all_that_a_check_needs() -> None:
    record = "Package: a\nVersion: 1:2\nSize: 30\nSHA256: ff\nDescription: x\n"
    assert parse_records(f"{record}\n{record}") == [Package("a", "1:2", 30, "ff")] * 2
    with pytest.raises(VmError, match="record of a lacks 'SHA256'"):
        parse_records("Package: a\nVersion: 1\nSize: 30\n")


def test_only_the_way_to_the_network_is_taken_from_the_machine() -> None:
    left = 'Acquire::Languages "none";\nDPkg::Post-Invoke "rm";\n'
    dump = f'Acquire::http::Proxy "p";\n{left}Acquire::Retries "3";\n'
    assert network_settings(dump) == 'Acquire::http::Proxy "p";\nAcquire::Retries "3";\n'


def test_a_machine_without_apt_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no apt-get on this machine.*install the package apt"):
        require_tools()


def test_a_machine_without_keys_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="debian-archive-keyring"):
        find_keyring([tmp_path / "none.gpg"])


def test_everything_that_apt_writes_is_below_its_folder(debian: Debian, tmp_path: Path) -> None:
    PrivateApt(tmp_path / "apt")
    sources = (tmp_path / "apt/debian.sources").read_text()
    assert "URIs: http://mirror.example/debian\n" in sources
    assert f"Signed-By: {tmp_path / 'keys.gpg'}" in sources
    configuration = (tmp_path / "apt/apt.conf").read_text()
    assert 'Acquire::http::Proxy "http://proxy:1";' in configuration
    assert "Post-Invoke" not in configuration
    named = [line for line in configuration.splitlines() if line.startswith("Dir::")]
    assert named
    assert all(str(tmp_path / "apt") in line or "/dev/null" in line for line in named)


def test_packages_are_fetched_once_and_checked(debian: Debian, tmp_path: Path) -> None:
    debian.package("busybox-static", "1:1.37", {"bin/busybox": b"BUSYBOX"})
    # In an archive's name the colon of a version is escaped; which machines it is for is open.
    offered = debian.folder / "busybox-static_1%3a1.37_all.deb"
    (debian.folder / "busybox-static_1%3a1.37_amd64.deb").rename(offered)
    apt = PrivateApt(tmp_path / "apt")
    (package,) = apt.describe([("busybox-static", "1:1.37")])
    target = apt.archives / offered.name
    for _ in range(2):
        assert apt.download([package], Silent()) == [target]
        assert sum(" download " in call for call in debian.calls) == 1
    target.write_bytes(b"x" * package.size)
    assert apt.download([package], Silent()) == [target]  # what is damaged is fetched again
    assert target.read_bytes() == offered.read_bytes()
    target.unlink()
    offered.write_bytes(b"x" * package.size)
    with pytest.raises(VmError, match="not what Debian signed"):
        apt.download([package], Silent())


def test_a_network_that_is_not_there(debian: Debian, tmp_path: Path) -> None:
    debian.break_network()
    apt = PrivateApt(tmp_path / "apt")
    with pytest.raises(VmError, match=r"apt-get update failed: E: Failed to fetch the list \(is the network"):
        apt.update(Silent())


def test_a_mirror_can_be_named(debian: Debian, tmp_path: Path) -> None:
    PrivateApt(tmp_path / "apt", "http://other.example/debian")
    assert "URIs: http://other.example/debian\n" in (tmp_path / "apt/debian.sources").read_text()
    assert not any("--print-uris" in call for call in debian.calls)
