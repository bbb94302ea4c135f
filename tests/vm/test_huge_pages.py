# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.errors import UsageError
from hostzero.units import PMD_SIZE
from hostzero.vm.huge_pages import Pool, read_pool, require_pages


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool of 10 pages, of which 6 are free and 2 of those reserved."""
    for name, value in (("nr_hugepages", 10), ("free_hugepages", 6), ("resv_hugepages", 2)):
        (tmp_path / name).write_text(f"{value}\n")
    return tmp_path


def test_what_is_reserved_is_not_available(pool: Path) -> None:
    assert read_pool(pool) == Pool(10, 6, 2)
    assert read_pool(pool).available == 4


def test_enough_is_enough(pool: Path) -> None:
    require_pages(4 * PMD_SIZE, pool)


def test_too_few_are_refused_with_the_command_that_provides_them(pool: Path) -> None:
    with pytest.raises(UsageError) as error:
        require_pages(5 * PMD_SIZE, pool)
    assert str(error.value) == (
        "--hugetlb: 10M needs 5 free 2 MiB pages and the pool has 4 (of 10, 2 reserved): "
        "run `sysctl vm.nr_hugepages=11` as root, and set it back afterwards"
    )


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no huge pages of 2 MiB"):
        require_pages(PMD_SIZE, tmp_path)
