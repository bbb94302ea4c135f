# SPDX-License-Identifier: GPL-2.0-only
"""Slow and obvious twins: a chain walked over Python lists, and the event rule by counting."""

from __future__ import annotations

from collections.abc import Sequence

from tests.virtio.memory import HIGH, LOW

NEXT, WRITE, INDIRECT = 1, 2, 4

RawChain = tuple[list[tuple[int, int]], list[tuple[int, int]]]


def in_ram(addr: int, length: int) -> bool:
    """Say whether all bytes of a range lie in one region of `split_memory`."""
    return addr + length <= LOW or (addr >= HIGH and addr + length <= HIGH + LOW)


def naive_walk(table: Sequence[tuple[int, int, int, int]], head: int) -> RawChain | None:
    """Return the readable and the writable segments of a chain; None if a rule is broken."""
    order: list[int] = []
    index = head
    while True:
        if index in order or index >= len(table):
            return None
        order.append(index)
        _, _, flags, following = table[index]
        if not flags & NEXT:
            break
        index = following
    entries = [table[index] for index in order]
    if any(flags & INDIRECT for _, _, flags, _ in entries):
        return None
    if sum(length for _, length, _, _ in entries) > 2**32:
        return None
    directions = [bool(flags & WRITE) for _, _, flags, _ in entries]
    if directions != sorted(directions):
        return None
    if any(length and not in_ram(addr, length) for addr, length, _, _ in entries):
        return None
    readable = [(addr, length) for addr, length, flags, _ in entries if length and not flags & WRITE]
    writable = [(addr, length) for addr, length, flags, _ in entries if length and flags & WRITE]
    return readable, writable


def naive_need_event(event: int, new: int, old: int) -> bool:
    """Say whether an entry with index `event` was written on the way from `old` to `new`."""
    index = old
    while index != new:
        if index == event:
            return True
        index = (index + 1) % 65536
    return False
