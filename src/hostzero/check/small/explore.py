# SPDX-License-Identifier: GPL-2.0-only
"""Breadth first through every state that a tiny guest can reach.

From each state every action is tried, and each result that was not seen before is kept to be
tried in its turn. States wait in chunks, first in, first out; a chunk whose states have all been
tried is dropped. Of every state its parent and the action that led to it are kept for good: that
is the way back, and breadth first makes it a shortest one.

The inner loop is compiled. It stops when it has done what was asked of it, when something must
grow, and when an action finds a violation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from hostzero.check.small.guest_state import MOVED, Picture, arrange, changes, fingerprint, load, save, undo
from hostzero.check.small.layout import DONE, NOT_NOW
from hostzero.check.small.oracle import check_all
from hostzero.check.small.scene_state import normal_form
from hostzero.check.small.state_set import StateSet, add
from hostzero.check.small.steps import act
from hostzero.check.violation import Violation
from hostzero.errors import HostzeroError, VmBug
from hostzero.jit import COMPILER_ON, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hostzero.check.recording import Step
    from hostzero.mm.mmzone import Memory

FIRST_VIOLATION: Final = 100
"""From here on `act` and `check_all` return what is wrong."""

# What one call of the inner loop ended for; a violation is its code, and larger.
_PAUSED = 0
_CHUNK_DONE = 1
_NO_ROOM = 2

# The counters that the inner loop and Python share.
_STATES = 0  # visited so far; a state's number is how many there were before it
_TRANSITIONS = 1  # actions done and checked
_PARENT = 2  # number of the state that is being tried
_ACTION = 3  # the action that is being tried
_ROOM = 4  # how many states may still be added
_BUDGET = 5  # how many states to try before the next pause
_COUNTERS = 6

_CHUNK_WORDS: Final = 1 << 20
_BYTES_PER_WORD: Final = 10  # of a waiting state: the word and where it belongs
_BYTES_PER_STATE: Final = 8  # of any state: parent and action


class World(Protocol):
    """Where to search: how it begins and what can happen. `small_guest` is the real one."""

    def new_guest(self, setup: Any) -> tuple[Memory, Any]:
        """Boot a guest."""

    def actions(self, setup: Any) -> NDArray[np.int64]:
        """Return every action that may ever be possible, a row of four numbers each."""

    def violation(self, mem: Memory, scene: Any, code: int) -> Violation:
        """Describe what `act` found."""

    def bug(self, mem: Memory, error: VmBug) -> Violation:
        """Describe a failed assertion of the allocator."""

    def step_of(self, op: int, a: int, b: int, c: int) -> Step:
        """Return an action as a step of a recording."""

    def action_of(self, step: Step, setup: Any) -> tuple[int, int, int, int]:
        """Return a step of a recording as an action."""

    def normal_form(self, mem: Any, scene: Any) -> None:
        """Bring a scene into its normal form."""

    def state_words(self, mem: Memory, scene: Any) -> Mapping[str, Any]:
        """Return which words of the scene's arrays are state once it is in normal form."""


class Chunk(NamedTuple):
    """Waiting states, each as the words in which it differs from boot."""

    at: Any  # uint16: which word
    word: Any
    end: Any  # by state: where its words end
    used: Any  # three numbers: states, words, states that have been tried


def _unpack_words(picture: Picture, chunk: Chunk, state: int, out: Any) -> None:
    for i in range(len(picture.boot)):
        out[i] = picture.boot[i]
    start = chunk.end[state - 1] if state > 0 else 0
    for i in range(start, chunk.end[state]):
        out[np.int64(chunk.at[i])] = chunk.word[i]


def _pack_words(picture: Picture, chunk: Chunk, words: Any) -> None:
    n = chunk.used[1]
    for i in range(len(picture.boot)):
        word = words[i]
        if word != picture.boot[i]:
            chunk.at[n] = i
            chunk.word[n] = word
            n += 1
    chunk.end[chunk.used[0]] = n
    chunk.used[0] += 1
    chunk.used[1] = n


# The same with whole arrays, as in `guest_state`.


def _unpack_arrays(picture: Picture, chunk: Chunk, state: int, out: Any) -> None:
    out[:] = picture.boot
    start = chunk.end[state - 1] if state > 0 else 0
    out[chunk.at[start : chunk.end[state]]] = chunk.word[start : chunk.end[state]]


def _pack_arrays(picture: Picture, chunk: Chunk, words: Any) -> None:
    (at,) = np.nonzero(words != picture.boot)
    start = int(chunk.used[1])
    end = start + len(at)
    chunk.at[start:end] = at
    chunk.word[start:end] = words[at]
    chunk.end[chunk.used[0]] = end
    chunk.used[0] += 1
    chunk.used[1] = end


unpack = compiled(_unpack_words) if COMPILER_ON else _unpack_arrays
"""Write the words of one waiting state: `unpack(picture, chunk, state, out)`."""

pack = compiled(_pack_words) if COMPILER_ON else _pack_arrays
"""Append a state to a chunk that has room for it: `pack(picture, chunk, words)`."""


@compiled
def expand(
    mem: Any,
    scene: Any,
    picture: Picture,
    actions: Any,
    source: Chunk,
    target: Chunk,
    table: Any,
    ways: Any,
    now: Any,
    new: Any,
    counters: Any,
) -> int:
    """Try every action from waiting states of `source`; new states go to `target`, which may be the same.

    Before a state is tried there is room for as many new ones as there are actions, so that a
    state is tried as a whole. What is raised leaves `counters` at the state and the action.
    """
    count = len(actions)
    while source.used[2] < source.used[0]:
        if counters[_BUDGET] <= 0:
            return _PAUSED
        if (
            counters[_ROOM] < count
            or target.used[0] + count > len(target.end)
            or target.used[1] + count * len(new) > len(target.word)
        ):
            return _NO_ROOM
        unpack(picture, source, source.used[2], now)
        load(picture, now)
        fingerprint(picture, now)
        for k in range(count):
            counters[_ACTION] = k
            code = act(mem, scene, actions[k, 0], actions[k, 1], actions[k, 2], actions[k, 3])
            if code == NOT_NOW:
                continue
            counters[_TRANSITIONS] += 1
            if code != DONE:
                return code
            normal_form(mem, scene)
            changed = changes(picture, now)
            if add(table, picture.print_[2], picture.print_[3]):
                code = check_all(mem, scene)
                if code != DONE:
                    return code
                save(picture, new)
                pack(picture, target, new)
                ways[counters[_STATES], 0] = counters[_PARENT]
                ways[counters[_STATES], 1] = k
                counters[_STATES] += 1
                counters[_ROOM] -= 1
            undo(picture, now, changed)
        source.used[2] += 1
        counters[_PARENT] += 1
        counters[_BUDGET] -= 1
    return _CHUNK_DONE


@dataclass(frozen=True)
class Found:
    """What an exploration found, and the shortest way there.

    Attributes:
        violation: what is wrong.
        steps: from boot on.
    """

    violation: Violation
    steps: tuple[Step, ...]


class Exploration:
    """The states of one guest, from boot on.

    Attributes:
        states: how many have been visited.
        transitions: how many actions were done and checked.
        depth: how many steps all sequences have that were tried completely.
        closed: every state has been visited, and every action tried in it.
        found: what was found; nothing is searched after it.
        mem: the guest, in any of its states.
        scene: what else there is of it.
    """

    def __init__(
        self,
        world: World,
        setup: Any,
        expand: Callable[..., int] = expand,
        actions: NDArray[np.int64] | None = None,
    ) -> None:
        """Boot the guest; it is the first state.

        Args:
            world: what can happen.
            setup: how the guest is made.
            expand: the inner loop.
            actions: those to try; all of the setup's if None.
        """
        if actions is None:
            actions = world.actions(setup)
        self._world = world
        self._expand = expand
        self.setup = setup
        mem, scene = world.new_guest(setup)
        world.normal_form(mem, scene)
        self.mem, self.scene, self._picture = arrange(mem, scene, world.state_words(mem, scene))
        self._actions = np.ascontiguousarray(actions, dtype=np.int64).reshape(-1, 4)
        words = len(self._picture.boot)
        self._now, self._new = np.zeros((2, words), dtype=np.int64)
        self._chunk_words = max(_CHUNK_WORDS, 4 * words * len(self._actions))
        self._chunks: deque[Chunk] = deque([self._new_chunk()])
        self._seen = StateSet()
        self._seen.add(0, 0)  # boot differs from boot in nothing
        self._ways = np.zeros((1 << 12, 2), dtype=np.int32)
        pack(self._picture, self._chunks[0], self._picture.boot)
        self._counters = np.zeros(_COUNTERS, dtype=np.int64)
        self._counters[_STATES] = 1
        self._level_end = 1
        self._untouched = self._fixed_bytes()
        self.depth = 0
        self.closed = False
        self.found: Found | None = None

    @property
    def states(self) -> int:
        """How many states have been visited."""
        return int(self._counters[_STATES])

    @property
    def transitions(self) -> int:
        """How many actions were done and checked."""
        return int(self._counters[_TRANSITIONS])

    @property
    def rows(self) -> Sequence[int]:
        """How often each row of the lifecycle table was exercised."""
        return getattr(self.scene, "rows", ())

    @property
    def nbytes(self) -> int:
        """How much memory the states take."""
        used = sum(int(chunk.used[1]) for chunk in self._chunks)
        return self._seen.nbytes + self._ways.nbytes + used * _BYTES_PER_WORD

    def advance(self, states: int, max_bytes: int) -> bool:
        """Try so many waiting states, or fewer if a level ends; return whether memory sufficed.

        Args:
            states: how many to try.
            max_bytes: how much memory there is for the states.
        """
        counters = self._counters
        counters[_BUDGET] = min(states, self._level_end - int(counters[_PARENT]))
        while not self.closed and self.found is None and counters[_BUDGET] > 0:
            if not self._make_room(max_bytes):
                return False
            code = self._call()
            if code == _CHUNK_DONE and len(self._chunks) > 1:
                self._chunks.popleft()
            if code >= FIRST_VIOLATION:
                self._stop(self._world.violation(self.mem, self.scene, code))
        if self.found is None and counters[_PARENT] == self._level_end:
            self.depth += 1
            self.closed = self.states == self._level_end
            self._level_end = self.states
        return True

    def check_untouched(self) -> None:
        """Fail if an array has changed that is not part of the state."""
        for name, before in self._untouched.items():
            if self._fixed_bytes()[name] != before:
                raise AssertionError(f"Memory.{name} has changed, and the exploration does not see it")

    def forget_states(self) -> None:
        """Give the memory back when nothing is left to be tried."""
        self._chunks.clear()
        self._seen = StateSet()
        self._ways = self._ways[:0].copy()

    def _call(self) -> int:
        try:
            return int(
                self._expand(
                    self.mem,
                    self.scene,
                    self._picture,
                    self._actions,
                    self._chunks[0],
                    self._chunks[-1],
                    self._seen.table,
                    self._ways,
                    self._now,
                    self._new,
                    self._counters,
                )
            )
        except HostzeroError as error:
            self._stop(bug_violation(self._world, self.mem, error))
            return _PAUSED

    def _stop(self, violation: Violation) -> None:
        numbers = [int(self._counters[_ACTION])]
        state = int(self._counters[_PARENT])
        while state:
            state, number = (int(value) for value in self._ways[state])
            numbers.append(number)
        rows = [[int(value) for value in self._actions[number]] for number in reversed(numbers)]
        self.found = Found(violation, tuple(self._world.step_of(*row) for row in rows))

    def _make_room(self, max_bytes: int) -> bool:
        count = len(self._actions)
        target = self._chunks[-1]
        self._seen.count = self.states
        more = 0
        if self._seen.room < count:
            more += self._seen.bytes_with_room(count)
        if len(self._ways) - self.states < count:
            more += 2 * self._ways.nbytes
        if self.nbytes + more > max_bytes:
            return False
        self._seen.make_room(count)
        if len(self._ways) - self.states < count:
            self._ways = np.concatenate([self._ways, np.zeros_like(self._ways)])
        if (
            target.used[0] + count > len(target.end)
            or target.used[1] + count * len(self._new) > self._chunk_words
        ):
            self._chunks.append(self._new_chunk())
        self._counters[_ROOM] = min(self._seen.room, len(self._ways) - self.states)
        return True

    def _new_chunk(self) -> Chunk:
        words = self._chunk_words
        return Chunk(
            np.empty(words, dtype=np.uint16),
            np.empty(words, dtype=np.int64),
            np.empty(words // 8, dtype=np.int64),
            np.zeros(3, dtype=np.int64),
        )

    def _fixed_bytes(self) -> dict[str, bytes]:
        fixed = set(self.mem._fields) - {*MOVED, "ram", "far"}
        return {name: getattr(self.mem, name).tobytes() for name in fixed}


def bug_violation(world: World, mem: Memory, error: HostzeroError) -> Violation:
    """Return what an error of the product's own is for a search."""
    return world.bug(mem, error) if isinstance(error, VmBug) else Violation("rot", str(error))
