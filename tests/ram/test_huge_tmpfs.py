# SPDX-License-Identifier: GPL-2.0-only
"""The private huge tmpfs: invisible where it works, one clear line where it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hostzero.errors import BackingUnavailable
from hostzero.ram import huge_tmpfs, libc, open_ram
from tests.ram.host import AVAILABLE, LACKING, SIZE, open_descriptors


def test_it_works_or_names_the_permission_or_kernel_that_is_missing() -> None:
    if "tmpfs-huge" in AVAILABLE:
        fd = huge_tmpfs.open_unnamed_file()
        assert libc.filesystem(fd)[0] == libc.TMPFS_MAGIC
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)
    else:
        assert any(word in LACKING["tmpfs-huge"] for word in ("CAP_SYS_ADMIN", "Linux 5.2", "huge"))


def test_a_process_that_may_mount_does_get_it() -> None:
    """A mistake of ours must not pass for a machine that lacks the backing."""
    fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    may_mount = int(fields["CapEff"], 16) >> 21 & 1 and fields["Seccomp"].strip() == "0"
    knows_huge = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").exists()
    if may_mount and knows_huge and not huge_tmpfs.huge_pages_denied():
        assert "tmpfs-huge" in AVAILABLE, LACKING
    else:
        assert "tmpfs-huge" not in AVAILABLE or fields["Seccomp"].strip() != "0"


def test_no_mount_appears_in_this_process_or_stays_behind() -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    descriptors = open_descriptors()
    try:
        with open_ram(SIZE, "tmpfs-huge") as ram:
            ram.buffer[0] = 1
            assert Path("/proc/self/mountinfo").read_text() == mounts
            assert open_descriptors() == sorted([*descriptors, str(ram.fileno)])
    except BackingUnavailable:
        assert "tmpfs-huge" in LACKING
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert open_descriptors() == descriptors


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.EPERM, "needs CAP_SYS_ADMIN: run as root, or use the anonymous backing"),
        (errno.EACCES, "needs CAP_SYS_ADMIN: run as root, or use the anonymous backing"),
        (errno.ENOSYS, r"needs fsopen\(2\), Linux 5.2 or later: use the anonymous backing"),
        (errno.EINVAL, "knows no huge=always: use the anonymous backing"),
        (errno.ENOMEM, r"the private tmpfs mount failed \(stub\)"),
    ],
)
def test_each_refusal_is_one_line_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, number: int, mend: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, "stub")

    monkeypatch.setattr(huge_tmpfs, "huge_pages_denied", lambda: False)
    monkeypatch.setattr(libc, "fsopen", refuse)
    with pytest.raises(BackingUnavailable, match=f"^tmpfs-huge: .*{mend}"):
        open_ram(SIZE, "tmpfs-huge")


@pytest.mark.parametrize("step", ["fsconfig_set", "fsconfig_create", "fsmount"])
def test_a_mount_that_fails_half_way_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, "stub")

    monkeypatch.setattr(libc, step, refuse)
    before = open_descriptors()
    with pytest.raises(BackingUnavailable, match=r"^tmpfs-huge: "):
        open_ram(SIZE, "tmpfs-huge")
    assert open_descriptors() == before


def test_an_administrators_deny_is_respected_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    control = tmp_path / "shmem_enabled"
    control.write_text("always within_size advise never [deny] force\n")
    assert huge_tmpfs.huge_pages_denied(control)
    control.write_text("always within_size advise [never] deny force\n")
    assert not huge_tmpfs.huge_pages_denied(control)
    assert not huge_tmpfs.huge_pages_denied(tmp_path / "missing")
    monkeypatch.setattr(huge_tmpfs, "huge_pages_denied", lambda: True)
    with pytest.raises(BackingUnavailable, match="write `never` in place of `deny` to /sys/kernel/mm"):
        open_ram(SIZE, "tmpfs-huge")
