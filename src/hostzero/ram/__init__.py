# SPDX-License-Identifier: GPL-2.0-only
"""Guest RAM on the host: a mapping over one of several backings, and proofs of zero.

Start at `open_ram`. `hostzero.ram.backing` holds the table of what a discard proves on
which backing, `hostzero.ram.residency` the table of what is counted as resident.
"""

from __future__ import annotations

from hostzero.ram.backing import BACKINGS
from hostzero.ram.guest_memory import GuestMemory, MemoryRegion
from hostzero.ram.region import Ram, ZeroProof, open_ram

__all__ = ["BACKINGS", "GuestMemory", "MemoryRegion", "Ram", "ZeroProof", "open_ram"]
