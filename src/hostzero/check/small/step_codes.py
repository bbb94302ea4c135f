# SPDX-License-Identifier: GPL-2.0-only
"""What can be done to a small guest: operations and the numbers that are their arguments."""

from __future__ import annotations

from typing import Final

ALLOC: Final = 0  # order, kind, cpu
FREE_BLOCK: Final = 1  # owner's number, how, cpu
DRAIN: Final = 2
REPORT_FILL: Final = 3  # order, migrate type
REPORT_SEND: Final = 4
REPORT_ANSWER: Final = 5  # entry, how
REPORT_DRAIN: Final = 6  # 1: the report succeeded
BALLOON_TAKE: Final = 7  # -, -, cpu
BALLOON_ANSWER: Final = 8  # entry, how
BALLOON_ACK: Final = 9
BALLOON_LEAVE: Final = 10
BALLOON_FREE: Final = 11  # -, -, cpu
BREAK: Final = 12  # page
BREAK_HANDLE: Final = 13
BREAK_MEND: Final = 14  # page
HIBERNATE: Final = 15
TRUST: Final = 16  # 1: the host's word is believed
ISOLATE: Final = 17  # pageblock
UNISOLATE: Final = 18  # pageblock
NR_OPS: Final = 19

NAMES: Final = (
    "alloc",
    "free",
    "drain",
    "report-fill",
    "report-send",
    "report-answer",
    "report-drain",
    "balloon-take",
    "balloon-answer",
    "balloon-ack",
    "balloon-leave",
    "balloon-free",
    "break",
    "break-handle",
    "break-mend",
    "hibernate",
    "trust",
    "isolate",
    "unisolate",
)

# Kinds of an allocation, bit by bit.
KIND_ZERO: Final = 1
KIND_MOVABLE: Final = 2
KIND_COMP: Final = 4
KIND_USER: Final = 8

# How an owner leaves its block.
CLEAN: Final = 0
DIRTY: Final = 1
FLAGGED: Final = 2  # dirty, and flags of the owner's are still set
AS_ZERO: Final = 3  # cleared by the owner, freed as known to be zero
PUT_AS_ZERO: Final = 4
SHARED: Final = 5  # put as known to be zero while somebody else has a reference and writes
NOLOCK: Final = 6  # from a place that holds the zone lock
NOLOCK_AS_ZERO: Final = 7  # as both: known to be zero, while the zone lock is held
NR_HOWS: Final = 8

# How the device answers.
FAILS: Final = 0
ZEROES: Final = 1
PARTLY: Final = 2  # of a report: half of the block; of a balloon page: all of it, without saying so

# What a scene knows of its setup: `ctl[SETUP + ...]`.
S_CAPACITY: Final = 0
S_OWNERS: Final = 1
S_BALLOON: Final = 2
S_PAGE_HINTS: Final = 3  # bit 7: balloon pages may be marked
S_RECLAIM: Final = 4

# held
H_OWNER: Final = 1
H_BATCH: Final = 2
H_BALLOON: Final = 3
H_BROKEN: Final = 4

# before
B_ZEROED: Final = 0
B_STALLS: Final = 1
B_BAD: Final = 2
B_STATE: Final = 3  # of page reporting
