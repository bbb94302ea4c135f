# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numba import typeof

from hostzero.check.small import guest_state
from hostzero.check.small.guest_state import EVENTS, Picture, arrange, fingerprint, load, save
from hostzero.mm.mmzone import VM_DTYPE, WORDS_PER_PAGE, Memory
from tests.check.small import toy

LEFT_OUT = {
    "page_reporting_requests",
    "bug_pfn",
    "nr_poison_errors",
    "pgalloc",
    "pgfree",
    "pgfault",
    "pgmajfault",
    "thp_fault_alloc",
    "thp_fault_fallback",
    "allocstall",
    "alloc_fail",
    "fallback_claims",
    "fallback_steals",
    "pgmigrate_success",
    "pgmigrate_fail",
    "compact_stall",
    "compact_success",
    "compact_fail",
    "pswpin",
    "pswpout",
    "htlb_buddy_alloc_success",
    "htlb_buddy_alloc_fail",
    "memcg_charge_fail",
    "zeroed_bytes",
    "known_zero_bytes",
    "dropped_hint_bytes",
    "zeroed_in_vain_bytes",
    "zeroed_twice_bytes",
    "zero_allocs",
    "known_zero_allocs",
}
"""The counters that are no state. Whoever adds a field to `vm` decides here what it is."""

STATE = set(VM_DTYPE.names or ()) - LEFT_OUT


def everything(mem: Memory, scene: toy.Scene) -> dict[str, bytes]:
    """Return every byte of a guest by array and field, but for what is left out by intent."""
    found = {name: np.asarray(getattr(mem, name)).tobytes() for name in mem._fields if name != "vm"}
    found |= {f"vm.{name}": mem.vm[name].tobytes() for name in STATE}
    return found | {"owned": scene.owned.tobytes()}


def walk(mem: Memory, scene: toy.Scene, rows: Any, choose: random.Random, steps: int) -> None:
    for _ in range(steps):
        toy.act(mem, scene, *choose.choice(rows))


def guest(**setup: Any) -> tuple[Memory, toy.Scene, Picture]:
    mem, scene = toy.new_guest(toy.Setup(**setup))
    return arrange(mem, scene, toy.state_words(mem, scene))


def test_what_is_left_out_of_the_state_is_what_this_test_says() -> None:
    assert EVENTS == LEFT_OUT


def test_arranged_guest_is_the_same_guest_to_compiled_code() -> None:
    mem, scene = toy.new_guest(toy.Setup())
    new_mem, new_scene, _ = arrange(mem, scene, toy.state_words(mem, scene))
    assert everything(new_mem, new_scene) == everything(mem, scene)
    assert typeof(new_mem) == typeof(mem)
    assert typeof(new_scene) == typeof(scene)
    assert new_mem.mem_map.ctypes.data % 64 == 0


@pytest.mark.parametrize("seed", range(20))
def test_state_comes_back_byte_for_byte(seed: int) -> None:
    choose = random.Random(seed)
    mem, scene, picture = guest(pages=16, orders=(0, 1, 3))
    rows = toy.actions(toy.Setup(pages=16, orders=(0, 1, 3))).tolist()
    walk(mem, scene, rows, choose, 60)
    words = np.zeros_like(picture.boot)
    save(picture, words)
    before = everything(mem, scene)
    walk(mem, scene, rows, choose, 60)
    load(picture, words)
    assert everything(mem, scene) == before
    again = np.zeros_like(words)
    save(picture, again)
    assert (again == words).all()


@pytest.mark.parametrize("byte", [0xAA, 0x00])
def test_page_full_of_one_byte_comes_back_under_its_marks(byte: int) -> None:
    mem, _, picture = guest()
    contents = mem.ram.reshape(-1, WORDS_PER_PAGE)
    contents.view(np.uint8)[1] = byte
    contents[1, toy.MARKS[1]] = toy.DIRTY
    before = mem.ram.tobytes()
    words = np.zeros_like(picture.boot)
    save(picture, words)
    contents[1] = 7
    contents[2] = 8
    load(picture, words)
    assert mem.ram.tobytes() == before


def test_counters_of_events_make_no_new_state_and_a_page_on_another_list_does() -> None:
    mem, scene, picture = guest()
    words = np.zeros_like(picture.boot)

    def print_now() -> tuple[int, int]:
        save(picture, words)
        fingerprint(picture, words)
        return int(picture.print_[0]), int(picture.print_[1])

    assert print_now() == (0, 0)
    for name in EVENTS:
        mem.vm[name] += 5
    scene.scratch[0] += 1
    assert print_now() == (0, 0)
    prints = [print_now()]
    for row in ([toy.ALLOC, 0, 0, 0], [toy.FREE, 0, 0, 0], [toy.DRAIN, 0, 0, 0]):
        assert toy.act(mem, scene, *row) == 0
        prints.append(print_now())
    assert len(set(prints)) == 4
    assert len({a for a, _ in prints}) == len({b for _, b in prints}) == 4


def test_step_is_undone_and_its_fingerprint_is_that_of_the_whole_state() -> None:
    choose = random.Random(1)
    mem, scene, picture = guest(pages=8, orders=(0, 2))
    rows = toy.actions(toy.Setup(pages=8, orders=(0, 2))).tolist()
    now, after = np.zeros((2, len(picture.boot)), dtype=np.int64)
    for _ in range(30):
        walk(mem, scene, rows, choose, 3)
        save(picture, now)
        load(picture, now)
        fingerprint(picture, now)
        before = everything(mem, scene)
        walk(mem, scene, rows, choose, 3)
        count = guest_state.changes(picture, now)
        by_step = picture.print_[2:].tolist()
        save(picture, after)
        assert picture.changed[:count].tolist() == np.nonzero(now != after)[0].tolist()
        guest_state.undo(picture, now, count)
        assert everything(mem, scene) == before
        fingerprint(picture, after)
        assert picture.print_[:2].tolist() == by_step


@pytest.mark.parametrize("seed", range(5))
def test_loops_that_are_compiled_do_what_whole_arrays_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both as plain Python: compiled, the mixing takes no arrays and gives no numbers that wrap.
    monkeypatch.setattr(guest_state, "mix", getattr(guest_state.mix, "py_func", guest_state.mix))
    choose = random.Random(seed)
    mem, scene, picture = guest(pages=16)
    rows = toy.actions(toy.Setup(pages=16)).tolist()
    walk(mem, scene, rows, choose, 40)
    one, two = np.zeros((2, len(picture.boot)), dtype=np.int64)
    guest_state._save_words(picture, one)
    guest_state._save_arrays(picture, two)
    assert (one == two).all()
    with np.errstate(over="ignore"):
        guest_state._fingerprint_words(picture, one)
    by_words = picture.print_.tolist()
    guest_state._fingerprint_arrays(picture, one)
    assert picture.print_.tolist() == by_words
    states, found = [], []
    for put_back in (guest_state._load_words, guest_state._load_arrays):
        walk(mem, scene, rows, choose, 20)
        put_back(picture, one)
        states.append(everything(mem, scene))
    walk(mem, scene, rows, choose, 20)
    for look in (guest_state._changes_words, guest_state._changes_arrays):
        with np.errstate(over="ignore"):
            count = look(picture, one)
        found.append((picture.changed[:count].tolist(), picture.print_.tolist()))
    guest_state._undo_words(picture, one, len(found[0][0]))
    states.append(everything(mem, scene))
    assert states[0] == states[1] == states[2]
    assert found[0] == found[1]
