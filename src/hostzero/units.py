# SPDX-License-Identifier: GPL-2.0-only
"""Addresses of different spaces as different types, page sizes, and sizes as text.

A guest frame number, a guest physical address and a host virtual address are all
integers, and mixing them up is the classic balloon bug. They are distinct types
here, so that the type checker refuses the mix.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from hostzero.errors import UsageError

Pfn = NewType("Pfn", int)
"""A guest page frame number: an index into `mem_map`."""

Gpa = NewType("Gpa", int)
"""A guest physical address, in bytes."""

Hva = NewType("Hva", int)
"""A host virtual address, in bytes."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PMD_SHIFT: Final = 21
PMD_SIZE: Final = 1 << PMD_SHIFT
PMD_ORDER: Final = PMD_SHIFT - PAGE_SHIFT

_SUFFIXES: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE: Final = re.compile(r"(?P<digits>[0-9]+) ?(?P<suffix>[KMGT]?)(?:i?B)?", re.IGNORECASE)


def pfn_to_gpa(pfn: Pfn) -> Gpa:
    """Return the first byte's guest physical address of a page (kernel: `PFN_PHYS`)."""
    return Gpa(pfn << PAGE_SHIFT)


def gpa_to_pfn(gpa: Gpa) -> Pfn:
    """Return the page that holds a guest physical address (kernel: `PHYS_PFN`)."""
    return Pfn(gpa >> PAGE_SHIFT)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``256M``, ``2GiB`` or ``4096`` names.

    Suffixes are binary (K = 1024) and their case does not matter, as in QEMU's ``-m``.

    Raises:
        UsageError: the text is not a whole number with one of those suffixes, or is zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size: write a whole number and K, M, G or T, as in 256M")
    size = int(match["digits"]) << _SUFFIXES[match["suffix"].upper()]
    if size == 0:
        raise UsageError(f"{text!r} is not a size: it must be above zero")
    return size


def format_size(size: int) -> str:
    """Return a size in the largest binary unit that divides it, as `parse_size` reads it."""
    for suffix, shift in (("T", 40), ("G", 30), ("M", 20), ("K", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{suffix}"
    return str(size)
