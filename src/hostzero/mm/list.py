# SPDX-License-Identifier: GPL-2.0-only
"""Circular doubly linked lists over `mem_map` (kernel: `include/linux/list.h`).

A node is an index into `mem_map`; a head is such an index too (see `mmzone`).
"""

from __future__ import annotations

import numpy as np

from hostzero.jit import inline
from hostzero.mm.mmzone import Memory

LIST_POISON = -2
"""The link of a page that is on no list: walking it is an error, not a silent end."""


@inline
def INIT_LIST_HEAD(mem: Memory, head: int) -> None:
    mem.mem_map[head].lru_next = head
    mem.mem_map[head].lru_prev = head


@inline
def list_empty(mem: Memory, head: int) -> bool:
    return mem.mem_map[head].lru_next == head


@inline
def list_next(mem: Memory, node: int) -> int:
    """Return the node after `node`, widened: a 32-bit index would compile every caller twice."""
    return np.int64(mem.mem_map[node].lru_next)  # type: ignore[return-value]


@inline
def list_first(mem: Memory, head: int) -> int:
    """Return the first node; the head itself if the list is empty."""
    return list_next(mem, head)


@inline
def list_last(mem: Memory, head: int) -> int:
    """Return the last node; the head itself if the list is empty."""
    return np.int64(mem.mem_map[head].lru_prev)  # type: ignore[return-value]


@inline
def list_add(mem: Memory, node: int, head: int) -> None:
    """Insert `node` right after `head`."""
    m = mem.mem_map
    after = m[head].lru_next
    m[after].lru_prev = node
    m[node].lru_next = after
    m[node].lru_prev = head
    m[head].lru_next = node


@inline
def list_add_tail(mem: Memory, node: int, head: int) -> None:
    """Insert `node` right before `head`: at the end of its list."""
    m = mem.mem_map
    before = m[head].lru_prev
    m[before].lru_next = node
    m[node].lru_prev = before
    m[node].lru_next = head
    m[head].lru_prev = node


@inline
def list_del(mem: Memory, node: int) -> None:
    """Take `node` off its list and poison its links."""
    m = mem.mem_map
    after = m[node].lru_next
    before = m[node].lru_prev
    m[after].lru_prev = before
    m[before].lru_next = after
    m[node].lru_next = LIST_POISON
    m[node].lru_prev = LIST_POISON


@inline
def list_rotate_to_front(mem: Memory, node: int, head: int) -> None:
    """Turn the list so that `node` is its first entry (kernel: `list_rotate_to_front`)."""
    m = mem.mem_map
    after = m[head].lru_next
    before = m[head].lru_prev
    m[after].lru_prev = before
    m[before].lru_next = after
    list_add_tail(mem, head, node)
