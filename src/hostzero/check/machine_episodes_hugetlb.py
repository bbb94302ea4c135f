# SPDX-License-Identifier: GPL-2.0-only
"""Episodes of huge pages: of the pool, beyond it, reserved, of a file, gigantic."""

from __future__ import annotations

from typing import Final

from hostzero.check.machine_moves import ANY, BETWEEN, DROP, LOOK, START, Move

HUGETLB: Final[tuple[tuple[Move, ...], ...]] = (
    # huge pages: of the pool, beyond it, reserved, of a file
    (
        START,
        ("resize_pool", (1, 2), ANY),
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        ("fill", ANY, ANY, 4, ANY),
        ("munmap", ANY, 0, 5),
        BETWEEN,
        ("take_huge_target", ANY),
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        LOOK,
        LOOK,
    ),
    (
        START,
        ("resize_pool", 0, (1, 2, 3)),
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        ("populate", ANY, ANY, ANY),
        ("fill", ANY, ANY, 4, ANY),
        DROP,
        BETWEEN,
        ("mmap_huge", ANY, ANY, ANY, ANY, ANY),
        LOOK,
    ),
    (
        START,
        ("flush", 0),
        ("resize_pool", (0, 0, 1, 2), (1, 2, 3, 4)),
        ("create_file", ANY),
        ("use_file", ANY, (0, 0, 2), ANY, ANY),
        ("mmap_huge", ANY, ANY, (2, 3), 0, (0, 1)),
        ("fill", ANY, ANY, 4, ANY),
        ("mmap_huge", ANY, ANY, ANY, 0, (0, 1)),
        LOOK,
        ("use_file", ANY, (1, 3, 5), (0, 1), ANY),
        LOOK,
        BETWEEN,
        ("use_file", ANY, (0, 2), ANY, ANY),
        LOOK,
    ),
    # a file that processes show and write, and holes in it
    (
        START,
        ("resize_pool", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("create_file", ANY),
        ("mmap_huge", ANY, ANY, (2, 3), 0, 0),
        ("fill", ANY, ANY, 5, 4),
        ("stain", ANY),
        ("mmap_huge", ANY, ANY, (0, 1), 0, 0),
        ("touch", ANY, ANY, ANY),
        ("touch", ANY, ANY, ANY),
        BETWEEN,
        LOOK,
        ("punch", ANY, ANY, ANY),
        LOOK,
    ),
    (
        ("resize_pool", (2, 3, 4), (0, 1)),
        ("create_file", ANY),
        ("use_file", ANY, 0, ANY, ANY),
        ("mmap_huge", ANY, ANY, (2, 3), 0, 0),
        ("fill", ANY, ANY, 5, 4),
        ("punch", ANY, ANY, ANY),
        ("punch", ANY, ANY, ANY),
        ("stain", ANY),
        ("use_file", ANY, 2, ANY, ANY),
        ("use_file", ANY, (0, 2), ANY, ANY),
        LOOK,
    ),
    (
        ("needs", "gigantic"),
        START,
        ("resize_gigantic_pool", (0, 0, 1), 1),
        ("mmap_huge", ANY, 0, (0, 1), 1, 5),
        LOOK,
        ("fill", ANY, ANY, 4, ANY),
        ("munmap", ANY, 0, 5),
        ("resize_gigantic_pool", ANY, ANY),
        ("mmap_huge", ANY, 0, ANY, 1, 5),
        LOOK,
    ),
)
