# SPDX-License-Identifier: GPL-2.0-only
"""The facts in the table of hostzero.ram.backing, read back from this machine's kernel."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hostzero.errors import BackingUnavailable
from hostzero.ram import Ram, backing, libc, open_ram
from hostzero.units import PAGE_SIZE, PMD_SIZE
from tests.ram.host import AVAILABLE, SIZE, fill

SHARED = [name for name in AVAILABLE if name != "anonymous"]


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest) -> Iterator[Ram]:
    """RAM over a file, once per such backing."""
    with open_ram(SIZE, request.param) as region:
        yield region


@pytest.fixture
def anonymous() -> Iterator[Ram]:
    """Private anonymous RAM."""
    with open_ram(SIZE) as region:
        yield region


# ------------------------------------------------------------------ calls that prove


def test_dontneed_zeroes_private_anonymous_memory(anonymous: Ram) -> None:
    pages = fill(anonymous)
    libc.madvise(anonymous.base, PMD_SIZE, mmap.MADV_DONTNEED)
    assert not pages[:512].any()
    assert pages[512:].all()


def test_a_hole_zeroes_every_shared_mapping_of_the_file(shared: Ram) -> None:
    assert shared.fileno is not None
    with Ram.from_fd(shared.fileno, 0, SIZE) as other:
        ours, theirs = fill(shared), other.array(np.uint64)
        assert theirs.all()
        libc.punch_hole(shared.fileno, 0, PMD_SIZE)
        assert not ours[:512].any()
        assert not theirs[: PMD_SIZE // 8].any()
        assert theirs[PMD_SIZE // 8 :].all()
        assert os.fstat(shared.fileno).st_size == SIZE


def test_half_a_huge_page_reads_zero_where_pages_are_small_enough(ram: Ram) -> None:
    pages = fill(ram)
    half = PMD_SIZE // 2
    proof = ram.discard(half, half)
    if ram.page_size == PMD_SIZE:
        assert proof.length == 0
        assert pages.all()
    else:
        assert proof.covers(half, half)
        assert pages[:256].all()
        assert not pages[256:512].any()
        assert pages[512:].all()


# ------------------------------------------------------------------ calls that do not


def test_dontneed_on_a_shared_mapping_succeeds_and_keeps_every_byte(shared: Ram) -> None:
    pages = fill(shared)
    before = pages.copy()
    libc.madvise(shared.base, SIZE, mmap.MADV_DONTNEED)
    assert np.array_equal(pages, before)


def test_free_on_anonymous_memory_succeeds_and_keeps_every_byte(anonymous: Ram) -> None:
    """The kernel may take such pages later, when it needs memory; at once it takes none."""
    pages = fill(anonymous)
    before = pages[:512].copy()
    libc.madvise(anonymous.base, PMD_SIZE, mmap.MADV_FREE)
    assert np.array_equal(pages[:512], before)


def test_dontneed_on_a_private_file_mapping_brings_the_files_bytes_back() -> None:
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.write(fd, b"file" * 1024)
    with mmap.mmap(fd, PAGE_SIZE, flags=mmap.MAP_PRIVATE) as private:
        os.close(fd)
        private[:4] = b"mine"
        private.madvise(mmap.MADV_DONTNEED)
        assert private[:4] == b"file"


def test_a_hole_does_not_reach_a_private_copy_of_the_file() -> None:
    with open_ram(SIZE, "memfd") as ram:
        assert ram.fileno is not None
        with mmap.mmap(ram.fileno, SIZE, flags=mmap.MAP_PRIVATE) as private:
            private[0] = 1
            assert ram.discard(0, SIZE).covers(0, SIZE)
            assert private[0] == 1


def test_madvise_rounds_half_a_page_up_to_a_whole_one(anonymous: Ram) -> None:
    """The reason for refusing such a range before the call."""
    pages = fill(anonymous)
    libc.madvise(anonymous.base, PAGE_SIZE // 2, mmap.MADV_DONTNEED)
    assert not pages[0].any()


def test_shmem_clears_exactly_the_bytes_of_an_unaligned_hole() -> None:
    with open_ram(SIZE, "memfd") as ram:
        assert ram.fileno is not None
        pages = fill(ram)
        libc.punch_hole(ram.fileno, 0, PAGE_SIZE // 2)
        assert not pages[0, :256].any()
        assert pages[0, 256:].all()


# ------------------------------------------------------------------ what backings are


def test_a_memfd_cannot_be_shrunk_under_our_mapping() -> None:
    with open_ram(SIZE, "memfd") as ram:
        assert ram.fileno is not None
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fileno, 0)


def test_files_behind_ram_have_no_name(shared: Ram) -> None:
    assert shared.fileno is not None
    target = str(Path(f"/proc/self/fd/{shared.fileno}").readlink())
    assert target.endswith(" (deleted)")
    assert not Path(target).exists()


def test_only_shared_backings_have_a_descriptor(ram: Ram) -> None:
    assert (ram.fileno is None) == (ram.backing == "anonymous")


def test_ram_works_without_transparent_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without them answers EINVAL to the advice."""
    real = libc.madvise

    def without_thp(address: int, length: int, advice: int) -> None:
        if advice == mmap.MADV_HUGEPAGE:
            raise OSError(errno.EINVAL, "stub")
        real(address, length, advice)

    monkeypatch.setattr(libc, "madvise", without_thp)
    with open_ram(SIZE) as ram:
        fill(ram)
        assert ram.discard(0, SIZE).covers(0, SIZE)
        assert not ram.array(np.uint64).any()


def pool(directory: Path, *, total: int, free: int, reserved: int) -> Path:
    for name, value in (("nr", total), ("free", free), ("resv", reserved)):
        (directory / f"{name}_hugepages").write_text(f"{value}\n")
    return directory


def test_a_pool_that_is_too_small_is_told_in_numbers(tmp_path: Path) -> None:
    line = backing.hugetlb_shortage(1 << 30, pool(tmp_path, total=100, free=60, reserved=10))
    assert line == (
        "hugetlb: 1G needs 512 free 2 MiB pages and the pool has 50 (of 100, 10 reserved): "
        "run `sysctl vm.nr_hugepages=562` as root"
    )


def test_an_empty_pool_asks_for_exactly_what_is_needed(tmp_path: Path) -> None:
    line = backing.hugetlb_shortage(PMD_SIZE, pool(tmp_path, total=0, free=0, reserved=0))
    assert "needs 1 free 2 MiB pages and the pool has 0 (of 0, 0 reserved)" in line
    assert "vm.nr_hugepages=1`" in line


def test_a_hugetlb_region_larger_than_the_pool_is_refused_at_once() -> None:
    """The mapping reserves its pages, so the shortage is an error and never a SIGBUS."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    names = ("free_hugepages", "nr_overcommit_hugepages")
    pages = sum(int((pool / name).read_text()) for name in names) if pool.exists() else 0
    with pytest.raises(BackingUnavailable, match=r"hugetlb: .*(run `sysctl vm.nr_hugepages=|has no 2 MiB)"):
        open_ram((pages + 1) * PMD_SIZE, "hugetlb")


def test_a_pool_with_enough_pages_does_provide_them() -> None:
    """A mistake of ours must not pass for a machine that lacks the backing."""
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    enough = free.exists() and int(free.read_text()) >= 2 * SIZE // PMD_SIZE
    assert not enough or "hugetlb" in AVAILABLE


def test_a_kernel_without_huge_pages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(
        BackingUnavailable, match=r"hugetlb: this kernel has no 2 MiB pages \(No such device\)"
    ):
        open_ram(SIZE, "hugetlb")


def test_hugetlb_failures_other_than_a_small_pool_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(BackingUnavailable, match="hugetlb: cannot map 8M of guest memory: File too large"):
        open_ram(SIZE, "hugetlb")


def test_physical_memory_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert backing.physical_memory() == os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemFree: 3 kB\nMemTotal:   20480 kB\n")
    monkeypatch.setattr(backing, "_MEMINFO", meminfo)
    assert backing.physical_memory() == 20 << 20
    with pytest.raises(BackingUnavailable, match=r"memfd: 22M .* use 20M or less"):
        open_ram(22 << 20, "memfd")
    meminfo.write_text("MemFree: 3 kB\n")
    with pytest.raises(BackingUnavailable, match="no MemTotal"):
        backing.physical_memory()
