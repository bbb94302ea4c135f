# SPDX-License-Identifier: GPL-2.0-only
"""What every scenario of one run shares, and the host memory that its guests boot on."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostzero.ram import open_ram

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostzero.bench.counters import Counters
    from hostzero.bench.options import BenchOptions
    from hostzero.bench.progress import Progress
    from hostzero.bench.results import Results
    from hostzero.ram import Ram


@dataclass(frozen=True, slots=True)
class Context:
    """One run: what was asked for, what measures, where results go, who is told."""

    options: BenchOptions
    counters: Counters
    results: Results
    progress: Progress

    @contextmanager
    def host_memory(self) -> Iterator[Ram]:
        """Open host memory for one guest; it is given back whatever ends the ``with`` block.

        Each guest has host memory of its own: whether a discard gives page tables back, and so
        whether huge pages return, depends on the host's kernel (6.14, CONFIG_PT_RECLAIM).
        """
        # Guest, driver and device refer to each other, and their arrays keep the mapping. Collected
        # here, where nobody holds the last guest any more, so that there are never two.
        gc.collect()
        with open_ram(self.options.memory, self.options.backing) as ram:
            try:
                yield ram
            finally:
                ram.discard(0, ram.size)
