# SPDX-License-Identifier: GPL-2.0-only
"""Intrusive lists against Python lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostzero.mm import MemoryManager
from hostzero.mm.list import (
    INIT_LIST_HEAD,
    LIST_POISON,
    list_add,
    list_add_tail,
    list_del,
    list_empty,
    list_first,
    list_last,
    list_next,
    list_rotate_to_front,
)
from tests.mm.guest import booted, walk

NODES = 6

steps = st.lists(
    st.tuples(st.sampled_from(["add", "tail", "del", "rotate"]), st.integers(0, NODES - 1)), max_size=30
)


@given(steps)
def test_lists_agree_with_python_lists(operations: list[tuple[str, int]]) -> None:
    with booted(4) as mm:
        mem, head = mm.mem, int(mm.mem.vm[0].balloon_head)
        first = mm.alloc_pages(0, 3)
        expected: list[int] = []
        for what, index in operations:
            node = first + index
            if what == "del" and node in expected:
                list_del(mem, node)
                expected.remove(node)
            elif what == "rotate" and node in expected:
                list_rotate_to_front(mem, node, head)
                at = expected.index(node)
                expected = expected[at:] + expected[:at]
            elif what == "add" and node not in expected:
                list_add(mem, node, head)
                expected.insert(0, node)
            elif what == "tail" and node not in expected:
                list_add_tail(mem, node, head)
                expected.append(node)
            assert walk(mem, head) == expected
            assert list_empty(mem, head) == (not expected)
            assert list_first(mem, head) == (expected[0] if expected else head)
            assert list_last(mem, head) == (expected[-1] if expected else head)


def test_the_links_of_a_removed_node_are_poisoned(mm: MemoryManager) -> None:
    mem, head = mm.mem, int(mm.mem.vm[0].balloon_head)
    node = mm.alloc_pages(0)
    list_add(mem, node, head)
    list_del(mem, node)
    assert (int(mem.mem_map[node].lru_next), int(mem.mem_map[node].lru_prev)) == (LIST_POISON, LIST_POISON)
    assert list_next(mem, node) == LIST_POISON
    assert list_next(mem, node) < 0


@pytest.mark.parametrize("insert", [list_add, list_add_tail])
def test_a_fresh_head_is_an_empty_list(mm: MemoryManager, insert: Callable[..., Any]) -> None:
    head, node = mm.alloc_pages(0), mm.alloc_pages(0)
    INIT_LIST_HEAD(mm.mem, head)
    assert list_empty(mm.mem, head)
    insert(mm.mem, node, head)
    assert walk(mm.mem, head) == [node]
