# SPDX-License-Identifier: GPL-2.0-only
"""Episodes: each is the use of one kind of memory, as operations in an order.

Memory is of interest when it comes back: taken, written, given back, perhaps reported, taken again
and looked at. Single operations in any order seldom do that to the same kind of memory before
something else comes between. An episode is such a life, with everything in it left open that can
be; any two episodes and any operation may follow each other (`machine_repertoire`).
"""

from __future__ import annotations

from typing import Final

from hostzero.check.machine_episodes_hugetlb import HUGETLB
from hostzero.check.machine_moves import ANY, BETWEEN, DROP, HOST, LOOK, SAME, START, Move

_ALL: Final[tuple[tuple[Move, ...], ...]] = (
    *HUGETLB,
    # what a process has: pages and huge pages, at any address
    (("mmap", ANY, (2, 3, 4, 5), 1), DROP, BETWEEN, ("mmap", ANY, ANY, (2, 3)), LOOK),
    (("flush", 0), ("mmap", ANY, (3, 4, 5), ANY), ("fill", ANY, ANY, ANY, ANY), DROP, ("mmap", ANY, ANY, 2)),
    (("mmap", ANY, ANY, 3), LOOK, LOOK, DROP, LOOK),
    # memory that need not be zero: what was read stays what it was
    (
        ("stain", ANY),
        ("mmap", ANY, (2, 3, 4, 5), 5),
        ("read", ANY, 0, ANY),
        BETWEEN,
        ("touch", ANY, 0, ANY),
        LOOK,
        DROP,
        LOOK,
    ),
    (("flush", 0), ("mmap", ANY, (4, 5), 2), DROP, BETWEEN, ("mmap", ANY, (4, 5), (3, 4)), LOOK),
    # huge pages of memory that is whole
    (START, ("mmap", ANY, (4, 5), ANY), LOOK, DROP, BETWEEN, ("mmap", ANY, (4, 5), (2, 3, 4)), LOOK),
    # nearly all memory in small pages, some of them gone again, and larger blocks wanted
    (
        START,
        ("kernel_block", (0, 1, 2, 3), ANY, ANY, ANY, ANY),
        ("flush", ANY),
        ("crowd", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("kernel_block", 0, ANY, ANY, ANY, 0),
        ("kernel_block", (1, 2, 3, 4), ANY, ANY, ANY, 0),
        ("kernel_block", (1, 2, 3, 4, 5), ANY, ANY, ANY, ANY),
        LOOK,
    ),
    # no larger block is left, and of what comes back as zero only a part is wanted
    (
        START,
        ("crowd", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("exhaust", (2, 3, 4), ANY, ANY, ANY),
        ("free_kernel_block", ANY, 1),
        ("drain",),
        ("kernel_block", (0, 1, 2), 0, ANY, ANY, (4, 5)),
        ("exhaust", (1, 2, 3), ANY, ANY, ANY),
        ("free_kernel_block", ANY, ANY),
    ),
    # no larger block is left, and what would make one waits in pieces on a CPU's list: for kernel memory
    # compaction comes before the lists are drained, and captures what a drain on its way puts together
    (
        ("needs", "little_memory"),
        START,
        ("crowd", ANY, (0, 1, 1, 2), ANY),
        ("thin_out", ANY, (0, 1, 1, 2)),
        ("exhaust", (1, 3, 3, 3), 0, (0, 1), ANY),
        ("thin_out", ANY, ANY),
        ("free_apart", ANY, (0xFFFC, 0x5555)),
        ("kernel_block", SAME, SAME, ANY, SAME, ANY),
        *((("free_apart", ANY, 0xFFFF), ("kernel_block", SAME, SAME, ANY, SAME, ANY)) * 4),
        ("exhaust", SAME, SAME, ANY, SAME),
    ),
    # out to the swap area and back
    (
        ("needs", "swap_pages"),
        ("mmap", ANY, (1, 2, 3), 1),
        ("advise", ANY, 0, ANY, 0),
        BETWEEN,
        ("touch", ANY, (0, 1, 6), ANY),
        ("read", ANY, (0, 2), ANY),
        DROP,
    ),
    # a cgroup at its limit
    (
        ("flush", 0),
        ("limit", (1, 2, 3)),
        ("mmap", 1, (2, 3, 4), 0),
        ("populate", ANY, ANY, ANY),
        ("limit", 0),
        ("populate", ANY, ANY, ANY),
        LOOK,
    ),
    # ranges and CMA, out of memory that was written, or reported, or both
    (
        ("take_run", ANY, ANY, ANY, ANY, ANY),
        BETWEEN,
        ("give_runs_back", ANY),
        ("take_run", ANY, ANY, ANY, ANY, ANY),
    ),
    (
        ("needs", "cma"),
        ("mmap", ANY, (3, 4), 1),
        DROP,
        BETWEEN,
        ("take_from_cma", ANY, ANY),
        ("take_run", ANY, ANY, ANY, ANY, ANY),
        ("give_runs_back", ANY),
        ("take_from_cma", ANY, ANY),
    ),
    (
        ("needs", "cma"),
        ("flush", 0),
        (("hibernate", "suspend", "compact"),),
        ("mmap", ANY, (3, 4), (2, 4)),
        ("take_from_cma", ANY, ANY),
        LOOK,
    ),
    # ranges that begin and end anywhere, through memory that is partly known to be zero
    (
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (0, 4)),
        ("kernel_block", (0, 1, 2, 5), ANY, ANY, ANY, (0, 4)),
        ("free_kernel_block", ANY, ANY),
        ("stain", ANY),
        ("take_range", ANY, ANY, 1, ANY),
        BETWEEN,
        ("take_range", ANY, ANY, ANY, ANY),
        ("give_range_back", ANY, ANY),
        ("take_range", ANY, ANY, 1, ANY),
        LOOK,
    ),
    # pages that are moved, each with something else in it
    (
        START,
        ("mmap", ANY, (3, 4, 5), (0, 2, 3)),
        ("fill", ANY, ANY, (4, 5), 4),
        ("thin_out", ANY, ANY),
        ("stain", ANY),
        (("compact",),),
        ("take_run", ANY, ANY, ANY, ANY, ANY),
        ("take_range", ANY, ANY, ANY, 0),
        LOOK,
    ),
    # the kernel's own
    (
        ("kernel_block", ANY, ANY, ANY, ANY, (0, 7)),
        BETWEEN,
        ("free_kernel_block", ANY, ANY),
        BETWEEN,
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    (("kernel_block", ANY, ANY, ANY, ANY, (2, 3, 8)), BETWEEN, ("mmap", ANY, ANY, 2), LOOK),
    (
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (4, 5)),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (4, 5, 6)),
        BETWEEN,
        ("kernel_block", (0, 1, 3), ANY, (1, 3), ANY, ANY),
        LOOK,
    ),
    # what waits on a CPU's list, when the guest sleeps and when a page of it breaks
    (
        ("park", ANY, ANY, ANY, ANY),
        ("park", ANY, ANY, ANY, ANY),
        (("hibernate", "suspend"),),
        ("kernel_block", (0, 1, 2, 3, 9), ANY, (1, 3), ANY, ANY),
        ("kernel_block", (0, 1, 2, 3, 9), ANY, (1, 3), ANY, ANY),
    ),
    (
        ("park", ANY, ANY, ANY, ANY),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (2, 3, 8)),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (2, 3, 8)),
        ("break_page", ANY, (3, 5, 6)),
        BETWEEN,
        ("kernel_block", (0, 1, 3), ANY, (1, 3), ANY, ANY),
        ("mmap", ANY, ANY, 2),
        LOOK,
        ("repair_page", ANY),
    ),
    # large blocks side by side, of which not each comes back as zero
    (
        START,
        ("kernel_block", (8, 9), ANY, ANY, ANY, 0),
        ("kernel_block", (8, 9), ANY, ANY, ANY, 0),
        ("kernel_block", (8, 9), ANY, ANY, ANY, 0),
        ("free_kernel_block", ANY, ANY),
        ("free_kernel_block", ANY, ANY),
        ("free_kernel_block", ANY, ANY),
        ("drain",),
        ("kernel_block", (9, 10), ANY, (1, 3), ANY, ANY),
    ),
    # blocks by the dozen, and blocks of which a part is still held
    (
        ("kernel_block", (1, 2, 3), ANY, 0, ANY, 6),
        ("bulk", ANY, ANY, 0),
        BETWEEN,
        ("bulk", ANY, ANY, 1),
        ("free_kernel_block", ANY, ANY),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    # memory of another node than the nearest
    (
        ("needs", "two_nodes"),
        ("set_policy", ANY, ANY, ANY),
        ("mmap", ANY, (2, 3, 4), (1, 2)),
        ("mbind", ANY, 0, 5, ANY, ANY),
        ("populate", ANY, 0, 5),
        LOOK,
    ),
    # promises of what is free, and pages that were broken
    (
        ("needs", "page_poisoning"),
        ("break_page", ANY, (0, 2, 3)),
        ("break_page", ANY, (1, 4)),
        ("repair_page", ANY),
        ("repair_page", ANY),
        BETWEEN,
        ("kernel_block", ANY, ANY, ANY, ANY, ANY),
    ),
    (
        ("needs", "init_on_free"),
        ("break_page", ANY, (0, 2, 3)),
        ("break_page", ANY, (1, 4)),
        ("repair_page", ANY),
        ("repair_page", ANY),
        BETWEEN,
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    (
        ("needs", "init_on_free"),
        ("flush", 0),
        ("park", ANY, ANY, ANY, ANY),
        ("kernel_block", ANY, ANY, ANY, ANY, (4, 5, 8)),
        ("hibernate",),
        LOOK,
    ),
    # owners that leave their flags behind, where nobody looks
    (
        ("needs", "unchecked"),
        ("flush", ANY),
        ("kernel_block", ANY, ANY, ANY, ANY, (7, 9)),
        ("kernel_block", (0, 1, 2), ANY, ANY, ANY, 9),
        ("free_kernel_block", ANY, 0),
        ("take_run", ANY, ANY, ANY, ANY, 1),
        ("give_runs_back", ANY),
        ("mmap", ANY, ANY, (2, 3)),
        LOOK,
    ),
    # fragmented memory, and a large block wanted
    (
        ("mmap", ANY, (4, 5), (1, 2)),
        ("mmap", ANY, (4, 5), (1, 2)),
        ("balloon", ANY),
        ("thin_out", ANY, ANY),
        ("thin_out", ANY, ANY),
        ("kernel_block", (3, 8, 9), ANY, ANY, ANY, 8),
        ("kernel_block", (7, 8, 9, 10), ANY, (0, 3), ANY, 0),
        ("kernel_block", (8, 9), ANY, ANY, ANY, 0),
        ("compact",),
        LOOK,
    ),
    # the balloon
    (
        ("balloon", (2, 3, 4)),
        BETWEEN,
        ("migrate_balloon", ANY, ANY),
        ("balloon", 0),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    (
        HOST,
        ("balloon", (2, 3, 4)),
        HOST,
        ("migrate_balloon", ANY, ANY),
        HOST,
        ("balloon", (1, 2, 5)),
        BETWEEN,
        ("balloon", (0, 1)),
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    # pages of a balloon that the device has shown to be zero, in exchange for pages that it has not
    (
        ("needs", "believed_balloon"),
        ("stain", ANY),
        ("balloon", (2, 3, 4)),
        (("host_fails", "host_lies"), ANY, ANY, ANY),
        ("migrate_balloon", ANY, ANY),
        (("host_fails", "host_lies"), ANY, ANY, ANY),
        ("migrate_balloon", ANY, ANY),
        ("stain", ANY),
        ("balloon", (0, 1)),
        ("kernel_block", ANY, ANY, (1, 3), ANY, ANY),
    ),
    # a host that fails
    (
        ("mmap", ANY, (3, 4), 1),
        ("munmap", ANY, ANY, ANY),
        ("thin_out", ANY, ANY),
        ("host_fails", ANY, ANY, ANY),
        HOST,
        HOST,
        ("flush", 0),
        HOST,
        ("flush", 0),
        ("mmap", ANY, ANY, 2),
    ),
    (("foreign_reports", ANY, ANY, ANY, ANY, ANY), ("mmap", ANY, ANY, 2), LOOK, ("flush", 0)),
    # a driver of another kind that is told of all that is free, more than once
    (
        ("needs", "reports_to_another"),
        START,
        ("foreign_reports", ANY, ANY, ANY, ANY, ANY),
        ("mmap", ANY, (3, 4, 5), (1, 2)),
        DROP,
        BETWEEN,
        ("foreign_reports", ANY, ANY, ANY, ANY, ANY),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    # marks in every place, and sleep
    (
        ("flush", 0),
        ("kernel_block", (0, 1, 3), ANY, ANY, ANY, (2, 4, 5)),
        ("kernel_block", (0, 1, 3, 9), ANY, ANY, ANY, 8),
        ("balloon", ANY),
        (("hibernate", "suspend", "reset_device"),),
        ("balloon", ANY),
        ("mmap", ANY, ANY, 2),
        LOOK,
    ),
    # what was only read so far is written
    (
        START,
        ("flush", 0),
        ("mmap", ANY, (2, 3, 4, 5), 0),
        ("read", ANY, 0, (2, 3)),
        (("touch", "populate"), ANY, 0, ANY),
        ("populate", ANY, 0, 5),
        DROP,
        LOOK,
    ),
    # memory that breaks, also under an owner who goes on, and goes
    (
        ("kernel_block", (0, 0, 1, 3), ANY, ANY, ANY, (0, 7)),
        ("break_page", ANY, 4),
        ("free_kernel_block", ANY, 0),
        BETWEEN,
        ("repair_page", ANY),
        BETWEEN,
        ("kernel_block", (0, 1), ANY, (1, 3), ANY, ANY),
        LOOK,
    ),
    (
        ("flush", 0),
        ("mmap", ANY, ANY, (1, 2)),
        ("break_page", ANY, ANY),
        ("break_page", ANY, (2, 3)),
        ("mmap", ANY, (1, 2), (1, 2)),
        BETWEEN,
        ("repair_page", ANY),
        BETWEEN,
        ("mmap", ANY, ANY, ANY),
        LOOK,
    ),
)
EPISODES: Final = tuple(sorted(_ALL, key=lambda episode: episode[0][0] == "needs"))
"""Lives of each kind of memory; those that need something of the guest are at the end."""
COMMON: Final = tuple(episode for episode in EPISODES if episode[0][0] != "needs")
