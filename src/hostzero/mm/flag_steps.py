# SPDX-License-Identifier: GPL-2.0-only
"""A race over page flags, step by step: who else may lose a poison bit (series: patch 2).

Kernel: the buddy allocator changes flags of free pages with a load and a store, because it
holds `zone->lock`. `TestSetPageHWPoison` is atomic, but atomicity helps only against other
atomic writers: a bit set between that load and that store is lost, and a broken page is
handed out. Patch 2 sets it under the lock. Here each task is
a generator that yields before it does anything another CPU could see, and does it when it is
resumed. `interleavings` runs every order of a set of tasks; a checker may use the generators
with a schedule of its own, and `memory_failure` itself sets the bit by running one.

`__free_pages_prepare` clears flags before it takes the lock. The series leaves that as it is,
so against it the bit can still be lost; the page is not on a list then, and has an owner.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from hostzero.mm.mmzone import Memory
from hostzero.mm.page_flags import PAGE_FLAGS_CHECK_AT_PREP, PG_hwpoison

LOAD: Final = "load"
STORE: Final = "store"
TEST_SET: Final = "test and set"
LOCK: Final = "lock"
UNLOCK: Final = "unlock"


@dataclass
class ZoneLock:
    """`zone->lock`: at most one task is between its LOCK and its UNLOCK."""

    held: bool = False


@dataclass(frozen=True)
class Step:
    """What a task does when it is resumed; a LOCK step can run only while its lock is free."""

    action: str
    lock: ZoneLock = field(default_factory=ZoneLock)

    @property
    def ready(self) -> bool:
        """Whether the task may be resumed now."""
        return self.action != LOCK or not self.lock.held


Task = Generator[Step, None, int]


def locked(task: Task, lock: ZoneLock) -> Task:
    """Return a task that holds the zone lock while it does what `task` does."""
    yield Step(LOCK, lock)
    lock.held = True
    result = yield from task
    yield Step(UNLOCK, lock)
    lock.held = False
    return result


def change_flags(mem: Memory, pfn: int, *, clear: int = 0, set_: int = 0) -> Task:
    """Change flags of a page as a non-atomic setter does; return what they were.

    Source: `__SetPageZeroed`, `__ClearPageReported` and their like, all of them under the lock.
    """
    yield Step(LOAD)
    flags = int(mem.mem_map[pfn].flags_f)
    yield Step(STORE)
    mem.mem_map[pfn].flags_f = (flags & ~clear) | set_
    return flags


def free_pages_prepare(mem: Memory, pfn: int) -> Task:
    """Clear what an owner left on a page (kernel: `__free_pages_prepare`, outside the zone lock)."""
    return change_flags(mem, pfn, clear=PAGE_FLAGS_CHECK_AT_PREP)


def TestSetPageHWPoison(mem: Memory, pfn: int) -> Task:
    """Set the poison bit atomically; return 1 if it was set before (kernel: same name)."""
    yield Step(TEST_SET)
    was_set = int(mem.mem_map[pfn].flags_f) & PG_hwpoison != 0
    mem.mem_map[pfn].flags_f |= PG_hwpoison
    return int(was_set)


def run(task: Task) -> int:
    """Run one task to its end with nobody else about; return what it returns."""
    while True:
        try:
            next(task)
        except StopIteration as end:
            return int(end.value)


def interleavings(make: Callable[[], Sequence[Task]]) -> Iterator[tuple[int, ...]]:
    """Run a set of tasks in every possible order; yield each schedule after it has run.

    Args:
        make: puts everything into its first state and returns the tasks, not yet begun. It is
            called once for each schedule.

    Yields:
        The number of the task that took each step. What the tasks worked on is in its
        last state until the iterator is asked for more.

    Raises:
        RuntimeError: tasks wait for a lock that nobody will release.
    """
    stack: list[tuple[int, ...]] = [()]
    while stack:
        prefix = stack.pop()
        tasks = list(make())
        waiting: dict[int, Step] = {number: next(task) for number, task in enumerate(tasks)}
        schedule = list(prefix)
        for number in prefix:
            _advance(tasks, waiting, number)
        while waiting:
            ready = [number for number, step in waiting.items() if step.ready]
            if not ready:
                raise RuntimeError(f"deadlock after {schedule}")
            stack += [(*schedule, number) for number in ready[:0:-1]]
            schedule.append(ready[0])
            _advance(tasks, waiting, ready[0])
        yield tuple(schedule)


def _advance(tasks: list[Task], waiting: dict[int, Step], number: int) -> None:
    try:
        waiting[number] = next(tasks[number])
    except StopIteration:
        del waiting[number]
