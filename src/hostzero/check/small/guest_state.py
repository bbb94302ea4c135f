# SPDX-License-Identifier: GPL-2.0-only
"""The whole state of a tiny guest as a vector of words: taken, put back, recognised.

`arrange` moves every array that a step can change into one block of words, so that taking a
state is copying the words that are state out of the block. Left out are the counters that only
count events (`EVENTS`): no code decides anything by them, and with them every state would be
new. They are not put back either and go on counting over all states.

A page's bytes are four words of the vector: three marks, which are what an owner writes, and one
that stands for all the rest. `steps` keeps to that: a page is full of one word but for its marks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np

from hostzero.jit import COMPILER_ON, compiled, inline
from hostzero.mm.mmzone import PAGE_DTYPE, WORDS_PER_PAGE, Memory
from hostzero.mm.records import as_records

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Words = NDArray[np.int64]

S = TypeVar("S", bound=tuple[Any, ...])

MOVED: Final = ("mem_map", "compound_head", "zone", "pcp", "pageblock", "vm", "cc", "kernel_lines")
"""The arrays of `Memory` that are state. `ram` is too, in its own way; nothing changes the others."""

EVENTS: Final = frozenset(
    {
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
)
"""The fields of `vm` that are no state: they count events, or say what a failed check was about."""

MARKS: Final = (0, 255, 511)
"""The words of a page that its owner writes."""
_FILLER: Final = 1  # the word that stands for those between the marks
_PER_PAGE: Final = len(MARKS) + 1

_LINKS: Final = PAGE_DTYPE.fields["lru_next"][1] // 8  # type: ignore[index]  # the word with both links
_PAGE_WORDS: Final = PAGE_DTYPE.itemsize // 8
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_C1, _C2, _C3 = _MIX


class Picture(NamedTuple):
    """A guest whose state can be taken: views of its arrays, and what compiled code needs.

    A state is a vector of `len(boot)` words: those of `block` at `at`, then those of `ram` at
    `ram_at`, four a page.
    """

    block: Any  # all arrays that have state
    at: Any  # which words of it are state
    place: Any  # by word of the block: where it is in the vector, or -1
    shadow: Any  # the block as it was when a state was put back
    ram: Any  # guest RAM, as signed words
    ram_at: Any  # by page: the marks, then the filler
    boot: Any  # the state at boot
    key_a: Any  # by word of the vector: what its value is mixed with
    key_b: Any
    print_: Any  # two words that `fingerprint` computed last, and two by `changes`
    changed: Any  # which words `changes` found changed


def _runs(mem: Memory, scene: tuple[Any, ...], state: Mapping[str, Any]) -> list[tuple[Any, Words]]:
    # Each array that moves, with the words of it that are state.
    runs = []
    for name in MOVED:
        array = getattr(mem, name)
        words = np.arange(-(-array.nbytes // 8))
        if name == "mem_map":
            # A list head is its links.
            nr_pages = int(mem.vm[0].nr_pages)
            words = words[(words < nr_pages * _PAGE_WORDS) | (words % _PAGE_WORDS == _LINKS)]
        elif name == "vm":
            fields = array.dtype.fields
            gone = [
                word
                for event in EVENTS
                for word in range(fields[event][1] // 8, (fields[event][1] + fields[event][0].itemsize) // 8)
            ]
            words = words[~np.isin(words, gone)]
        runs.append((array, words))
    for name, array in zip(scene._fields, scene, strict=True):  # type: ignore[attr-defined]
        runs.append((array, np.asarray(state[name], dtype=np.int64)))
    return runs


def arrange(mem: Memory, scene: S, state: Mapping[str, Any]) -> tuple[Memory, S, Picture]:
    """Return the same guest with its changing arrays in one block, and its picture.

    The guest given must not be used any more. Its state now is the picture's `boot`.

    Args:
        mem: the guest.
        scene: what else changes: a named tuple of arrays.
        state: which words of each array of `scene` are state; the others are scratch.
    """
    runs = _runs(mem, scene, state)
    starts = [0]
    for array, words in runs:
        if not len(words):
            starts.append(starts[-1])
            continue
        # Whole cache lines each: a page record is one.
        starts.append(starts[-1] + -(-array.nbytes // 64) * 8)
    room = np.zeros(starts[-1] + 8, dtype=np.int64)
    first = -(room.ctypes.data // 8) % 8
    block = room[first : first + starts[-1]]
    moved = []
    for (array, words), start in zip(runs, starts, strict=False):
        if not len(words):
            moved.append(array)
            continue
        copy = block[start : start + -(-array.nbytes // 8)].view(np.uint8)[: array.nbytes]
        copy[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        copy = copy.view(array.dtype).reshape(array.shape)
        moved.append(as_records(copy) if isinstance(array, np.recarray) else copy)
    at = np.concatenate([start + words for (_, words), start in zip(runs, starts, strict=False)])
    pages = np.arange(int(mem.vm[0].nr_pages), dtype=np.int64) * WORDS_PER_PAGE
    ram_at = (pages[:, None] + np.array([*MARKS, _FILLER])).reshape(-1)
    size = len(at) + len(ram_at)
    keys = np.random.Generator(np.random.PCG64(0x5A)).integers(
        np.iinfo(np.int64).min, np.iinfo(np.int64).max, size=(2, size), dtype=np.int64
    )
    place = np.full(len(block), -1, dtype=np.int64)
    place[at] = np.arange(len(at))
    picture = Picture(
        block,
        at.astype(np.int64),
        place,
        block.copy(),
        mem.ram.view(np.int64),
        ram_at,
        np.zeros(size, dtype=np.int64),
        keys[0].copy(),
        keys[1].copy(),
        np.zeros(4, dtype=np.int64),
        np.zeros(size, dtype=np.int64),
    )
    save(picture, picture.boot)
    new_mem = mem._replace(**dict(zip(MOVED, moved, strict=False)))
    return new_mem, type(scene)(*moved[len(MOVED) :]), picture


@inline
def mix(word: int, key: int) -> int:
    """Return 64 well mixed bits of a word and its key (the finaliser of splitmix64)."""
    h = (word ^ key) * _C1
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * _C2
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * _C3
    return h ^ ((h >> 31) & 0x1FFFFFFFF)


def _save_words(picture: Picture, out: Any) -> None:
    known = len(picture.at)
    for i in range(known):
        out[i] = picture.block[picture.at[i]]
    for i in range(len(picture.ram_at)):
        out[known + i] = picture.ram[picture.ram_at[i]]


def _load_words(picture: Picture, words: Any) -> None:
    known = len(picture.at)
    for i in range(known):
        picture.block[picture.at[i]] = words[i]
    for i in range(len(picture.block)):
        picture.shadow[i] = picture.block[i]
    for page in range(len(picture.ram_at) // _PER_PAGE):
        k = page * _PER_PAGE
        filler = words[known + k + _PER_PAGE - 1]
        if picture.ram[picture.ram_at[k + _PER_PAGE - 1]] != filler:
            first = page * WORDS_PER_PAGE
            for word in range(first, first + WORDS_PER_PAGE):
                picture.ram[word] = filler
        for i in range(k, k + _PER_PAGE - 1):
            if picture.ram[picture.ram_at[i]] != words[known + i]:
                picture.ram[picture.ram_at[i]] = words[known + i]


def _fingerprint_words(picture: Picture, words: Any) -> None:
    a = 0
    b = 0
    for i in range(len(words)):
        if words[i] != picture.boot[i]:
            mixed = mix(words[i], picture.key_a[i])
            a += mixed
            b += (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * picture.key_b[i]
    picture.print_[0] = a
    picture.print_[1] = b


def _changes_words(picture: Picture, before: Any) -> int:
    known = len(picture.at)
    n = 0
    now = picture.block
    then = picture.shadow
    # A cache line at a time: most are as they were.
    for g in range(0, len(now), 8):
        if (
            (now[g] ^ then[g])
            | (now[g + 1] ^ then[g + 1])
            | (now[g + 2] ^ then[g + 2])
            | (now[g + 3] ^ then[g + 3])
            | (now[g + 4] ^ then[g + 4])
            | (now[g + 5] ^ then[g + 5])
            | (now[g + 6] ^ then[g + 6])
            | (now[g + 7] ^ then[g + 7])
        ) == 0:
            continue
        for word in range(g, g + 8):
            if now[word] != then[word] and picture.place[word] >= 0:
                picture.changed[n] = picture.place[word]
                n += 1
    for i in range(len(picture.ram_at)):
        if picture.ram[picture.ram_at[i]] != before[known + i]:
            picture.changed[n] = known + i
            n += 1
    a = picture.print_[0]
    b = picture.print_[1]
    for j in range(n):
        i = picture.changed[j]
        word = picture.block[picture.at[i]] if i < known else picture.ram[picture.ram_at[i - known]]
        if before[i] != picture.boot[i]:
            mixed = mix(before[i], picture.key_a[i])
            a -= mixed
            b -= (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * picture.key_b[i]
        if word != picture.boot[i]:
            mixed = mix(word, picture.key_a[i])
            a += mixed
            b += (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * picture.key_b[i]
    picture.print_[2] = a
    picture.print_[3] = b
    return n


def _undo_words(picture: Picture, before: Any, count: int) -> None:
    known = len(picture.at)
    for j in range(count):
        i = picture.changed[j]
        if i < known:
            picture.block[picture.at[i]] = before[i]
            continue
        k = i - known
        if k % _PER_PAGE < _PER_PAGE - 1:
            picture.ram[picture.ram_at[k]] = before[i]
            continue
        first = k // _PER_PAGE * WORDS_PER_PAGE
        for word in range(first, first + WORDS_PER_PAGE):
            picture.ram[word] = before[i]
        for mark in range(k - _PER_PAGE + 1, k):
            picture.ram[picture.ram_at[mark]] = before[known + mark]


# The same with whole arrays: a loop over words takes a hundred times as long uncompiled.


def _save_arrays(picture: Picture, out: Any) -> None:
    known = len(picture.at)
    out[:known] = picture.block[picture.at]
    out[known:] = picture.ram[picture.ram_at]


def _load_arrays(picture: Picture, words: Any) -> None:
    known = len(picture.at)
    picture.block[picture.at] = words[:known]
    picture.shadow[:] = picture.block
    if (picture.ram[picture.ram_at] == words[known:]).all():
        return
    pages = picture.ram[: len(picture.ram_at) // _PER_PAGE * WORDS_PER_PAGE].reshape(-1, WORDS_PER_PAGE)
    contents = words[known:].reshape(-1, _PER_PAGE)
    (refilled,) = np.nonzero(pages[:, _FILLER] != contents[:, -1])
    pages[refilled] = contents[refilled, -1:]
    pages[:, list(MARKS)] = contents[:, :-1]


def _fingerprint_arrays(picture: Picture, words: Any) -> None:
    (at,) = np.nonzero(words != picture.boot)
    mixed = mix(words[at], picture.key_a[at])
    picture.print_[0] = mixed.sum()  # type: ignore[attr-defined]
    picture.print_[1] = ((mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * picture.key_b[at]).sum()


def _changes_arrays(picture: Picture, before: Any) -> int:
    words = np.empty_like(picture.boot)
    _save_arrays(picture, words)
    known = picture.print_[:2].copy()
    _fingerprint_arrays(picture, words)
    picture.print_[2:] = picture.print_[:2]
    picture.print_[:2] = known
    (changed,) = np.nonzero(words != before)
    picture.changed[: len(changed)] = changed
    return len(changed)


def _undo_arrays(picture: Picture, before: Any, count: int) -> None:
    if count:
        _load_arrays(picture, before)


save = compiled(_save_words) if COMPILER_ON else _save_arrays
"""Take the guest's state: `save(picture, out)`."""

load = compiled(_load_words) if COMPILER_ON else _load_arrays
"""Put a state back that `save` took: `load(picture, words)`. A page's bytes are written if they differ."""

fingerprint = compiled(_fingerprint_words) if COMPILER_ON else _fingerprint_arrays
"""Compute 128 bits that stand for a state into `picture.print_[:2]`: `fingerprint(picture, words)`.

Two sums over the words that differ from boot, each word mixed with keys for its place: a sum can be
corrected for the words that a step changes.
"""

changes = compiled(_changes_words) if COMPILER_ON else _changes_arrays
"""Find the words that have changed since a state was put back whose fingerprint is in `picture.print_[:2]`.

`changes(picture, before)` returns how many they are; they are in `picture.changed`, and the
fingerprint of the state now is in `picture.print_[2:]`.
"""

undo = compiled(_undo_words) if COMPILER_ON else _undo_arrays
"""Put back what `changes` found: `undo(picture, before, count)`."""
