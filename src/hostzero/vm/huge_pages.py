# SPDX-License-Identifier: GPL-2.0-only
"""The host's pool of 2 MiB huge pages: how many are free, and whether they will do.

The pool is the machine owner's. Nothing here changes it: a guest that needs more is refused with
the command that provides them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from hostzero.errors import UsageError
from hostzero.ram.backing import hugetlb_shortage
from hostzero.units import PMD_SIZE

POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


class Pool(NamedTuple):
    """The pool at one moment, in pages of 2 MiB.

    Attributes:
        total: its pages.
        free: those that hold nobody's memory.
        reserved: those of the free ones that somebody has been promised.
    """

    total: int
    free: int
    reserved: int

    @property
    def available(self) -> int:
        """Pages that another program could have."""
        return self.free - self.reserved


def read_pool(folder: Path = POOL) -> Pool:
    """Return the pool as it is.

    Raises:
        UsageError: this kernel has none.
    """
    try:
        names = ("nr_hugepages", "free_hugepages", "resv_hugepages")
        return Pool(*(int((folder / name).read_text()) for name in names))
    except OSError as error:
        raise UsageError("--hugetlb: this kernel has no huge pages of 2 MiB") from error


def require_pages(size: int, folder: Path = POOL) -> None:
    """Check that `size` bytes of huge pages can be had.

    Raises:
        UsageError: they cannot; the text has the command that provides them.
    """
    if read_pool(folder).available < size // PMD_SIZE:
        shortage = hugetlb_shortage(size, folder)
        raise UsageError(f"--{shortage}, and set it back afterwards")
