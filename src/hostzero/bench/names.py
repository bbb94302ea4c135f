# SPDX-License-Identifier: GPL-2.0-only
"""What is compared: scenarios, arms and phases, and what each leaves out."""

from __future__ import annotations

import enum
from typing import Final


class Scenario(enum.StrEnum):
    """How the guest comes by memory that the host has zeroed, and in which page size it takes it."""

    THP = "thp"
    SMALL_PAGES = "4k"
    BALLOON = "balloon"
    HUGETLB = "hugetlb"
    HUGETLB_RESERVED = "hugetlb-reserved"
    FRAGMENTED = "fragmented"
    MEMCG_LIMIT = "memcg-limit"


HUGETLB_SCENARIOS: Final = (Scenario.HUGETLB, Scenario.HUGETLB_RESERVED)
TIMED: Final = (Scenario.THP, Scenario.SMALL_PAGES, Scenario.BALLOON, *HUGETLB_SCENARIOS)
"""Scenarios that measure time: every arm through every phase."""

COUNTED: Final = (Scenario.FRAGMENTED, Scenario.MEMCG_LIMIT)
"""Scenarios that count what the guest does; each has cases of its own."""


class Arm(enum.StrEnum):
    """What the guest and the device do about zeroing."""

    NEVER_REPORTED = "never-reported"
    BASELINE = "baseline"
    OPTIMIZED = "optimized"
    NO_ZEROING = "no-zeroing"


class Phase(enum.StrEnum):
    """Which stretch of a process's life is measured; each begins with an empty mapping."""

    POPULATE = "populate"
    POPULATE_TOUCH = "populate+touch"
    POPULATE_FILL = "populate+fill"
    CHURN = "churn"


SCENARIO_TITLES: Final = {
    Scenario.THP: "2 MiB pages from reported blocks",
    Scenario.SMALL_PAGES: "4 KiB pages from reported blocks",
    Scenario.BALLOON: "2 MiB pages from a deflated balloon",
    Scenario.HUGETLB: "surplus hugetlb pages from reported blocks, allocated at the fault",
    Scenario.HUGETLB_RESERVED: "surplus hugetlb pages from reported blocks, reserved at mmap",
    Scenario.FRAGMENTED: "who gets known-zero pages when free memory lies in pieces",
    Scenario.MEMCG_LIMIT: "what is zeroed in vain when a memory cgroup is at its limit",
}

ARM_MEANINGS: Final = {
    Arm.NEVER_REPORTED: "memory never given to the host; the guest zeroes",
    Arm.BASELINE: "memory given to the host, bits 6 and 7 off; the guest zeroes what the host zeroes too",
    Arm.OPTIMIZED: "memory given to the host, bits 6 and 7 on; the guest zeroes what is not known to be zero",
    Arm.NO_ZEROING: "control: memory given to the host, the guest never zeroes (unsafe: a floor, no choice)",
}

PHASE_CAVEATS: Final = {
    Phase.POPULATE: (
        "maps and allocates, as the cover letter's program does, and never touches the memory. In the "
        "optimized arm the host's page fault and zeroing are moved to the first touch, not removed."
    ),
    Phase.POPULATE_TOUCH: (
        "populates and writes one byte per page, so the host's fault and zeroing are in it; "
        "a process that uses its memory pays at least this."
    ),
    Phase.POPULATE_FILL: "populates and writes every byte, which also brings the memory into the caches.",
    Phase.CHURN: (
        "maps, writes, unmaps and gives the memory away again, three times over. Giving it away is in the "
        "time here; driver and device are interpreted Python, so that part is dearer than a kernel's."
    ),
}

GENERAL_CAVEATS: Final = (
    (
        "balloon: a request names 256 pages, so the device drops half of a host huge page at a time; the "
        "host splits it and serves 4 KiB faults from then on, in every arm but never-reported."
    ),
    (
        "hugetlb: the process maps with MAP_NORESERVE, so that the fault allocates its surplus page. "
        "hugetlb-reserved maps as the cover letter's program does. That reserves: v8 allocates the pages at "
        "mmap without asking for zeros, forgets what the host zeroed, and zeroes again at the fault."
    ),
    (
        "The guest is a model in this process: its page tables are real words in its memory, but it has no "
        "hardware page fault of its own. A real guest pays that in every arm, so its ratios lie nearer to 1."
    ),
    "But for churn, giving memory away happens before the measured stretch; its cost is not in the numbers.",
)

COMPARISONS: Final = (
    (Arm.OPTIMIZED, Arm.BASELINE),
    (Arm.OPTIMIZED, Arm.NEVER_REPORTED),
    (Arm.NO_ZEROING, Arm.BASELINE),
)
"""Which arm is divided by which."""
