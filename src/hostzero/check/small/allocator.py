# SPDX-License-Identifier: GPL-2.0-only
"""The search "allocator": random steps on small guests, as many as there is time for.

It goes by episodes. Each boots another guest: a size, a way to boot, and how often each operation
is drawn are random, so that in one episode nearly all is freed as zero and in the next one hardly
anything is ("swarm testing", Groce et al., ISSTA 2012). Within an episode everything runs compiled.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hostzero.check.recording import Recording, Step
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.shrink import shrink_arguments, shrink_steps
from hostzero.check.small import layout, step_codes
from hostzero.check.small.allocator_loop import (
    COUNT,
    CPUS,
    DEEP_EVERY,
    MAX_ORDER,
    NR_LOOP,
    TOTAL,
    UNIFORM,
    WEIGHTS,
    run_log,
    run_steps,
)
from hostzero.check.small.layout import DONE, ROWS, STATE
from hostzero.check.small.small_guest import Setup, action_of, bug, new_guest, state_of, step_of, violation
from hostzero.check.small.steps import act
from hostzero.check.small.story import story_of
from hostzero.check.violation import Violation
from hostzero.errors import VmBug
from hostzero.jit import COMPILER_ON
from hostzero.mm.mmzone import MAX_PAGE_ORDER

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = tuple[int, int, int, int]
"""A step as it stands in the log: its operation and three arguments."""

_EPISODE: Final = 20_000 if COMPILER_ON else 300  # steps
_CHUNK: Final = 4_000 if COMPILER_ON else 50  # between two reports of progress
_CHUNK_LARGE: Final = 400 if COMPILER_ON else 50
_LARGE: Final = 0.02 if COMPILER_ON else 0.25
"""How many of the guests are about large blocks; compiled, each takes the time of a hundred others."""
_DEEP_EVERY: Final = 64 if COMPILER_ON else 200
_PAGES: Final = (16, 32, 64, 128, 256, 512, 1024, 2048) if COMPILER_ON else (16, 16, 32, 64, 1024)
_SHRINKING: Final = 20.0 if COMPILER_ON else 6.0  # seconds
_GROUPS: Final = (
    ((step_codes.ALLOC, step_codes.FREE_BLOCK), (2, 3, 6)),
    ((step_codes.DRAIN,), (0, 1, 3)),
    (
        (step_codes.REPORT_FILL, step_codes.REPORT_SEND, step_codes.REPORT_ANSWER, step_codes.REPORT_DRAIN),
        (0, 2, 4, 8),
    ),
    ((step_codes.TRUST,), (0, 1)),
    (
        (
            step_codes.BALLOON_TAKE,
            step_codes.BALLOON_ANSWER,
            step_codes.BALLOON_ACK,
            step_codes.BALLOON_LEAVE,
            step_codes.BALLOON_FREE,
        ),
        (0, 1, 3, 6),
    ),
    ((step_codes.BREAK, step_codes.BREAK_HANDLE, step_codes.BREAK_MEND), (0, 0, 1, 4)),
    ((step_codes.HIBERNATE,), (0, 0, 1, 4)),
    ((step_codes.ISOLATE, step_codes.UNISOLATE), (0, 0, 1, 4)),
)
"""Operations that belong together, and how much likelier they may be in an episode."""
_FLUSHES: Final = (0.0, 0.1, 0.5)
"""How often an episode reports everything that is free, between two chunks of random steps."""


def draw_setup(source: random.Random, pages: int | None) -> Setup:
    """Draw how the guest of an episode is made."""
    size = pages if pages is not None else source.choice(_PAGES)
    largest = min(size.bit_length() - 1, 10)
    if pages is None and source.random() < _LARGE:
        # Several pageblocks, and blocks that span them: what small guests cannot have.
        return Setup(
            pages=2048,
            cpus=source.choice((1, 2)),
            reporting_order=source.choice((6, 9, 9, 10)),
            capacity=source.choice((1, 2, 4)),
            trust=source.random() < 0.8,
            balloon=source.choice((0, 4)),
            owners=source.choice((2, 4, 8)),
            max_order=10,
            init_on_free=source.random() < 0.1,
            debug_vm=source.random() < 0.7,
            zero_aware=source.random() < 0.2,
            reclaim=source.random() < 0.8,
            pcp_high=source.choice((1, 600, 2048)),
            pcp_batch=source.choice((1, 2)),
        )
    return Setup(
        pages=size,
        cpus=source.choice((1, 2)),
        dirty=source.random() < 0.9,
        reporting_order=min(source.randint(0, largest), source.randint(0, largest), 9),
        capacity=source.choice((1, 2, 3, 4, 8, 32) if COMPILER_ON else (1, 2, 3, 4)),
        trust=source.random() < 0.8,
        page_hints=source.random() < 0.8,
        balloon=source.choice((0, 1, 4, 16)),
        owners=source.choice((2, 4, 16, 64)),
        max_order=source.randint(0, largest),
        poisoning=source.random() < 0.1,
        init_on_free=source.random() < 0.1,
        init_on_alloc=source.random() < 0.1,
        debug_vm=source.random() < 0.7,
        zero_aware=source.random() < 0.2,
        reclaim=source.random() < 0.8,
        pcp_high=source.choice((1, 2, 8, 64)),
        pcp_batch=source.choice((1, 2, 8)),
        watermark=source.choice((0, 0, 2)),
    )


def draw_weights(source: random.Random, setup: Setup) -> NDArray[np.int64]:
    """Draw how often each operation happens in an episode; some do not happen at all."""
    weights = np.full(step_codes.NR_OPS, 0, dtype=np.int64)
    for group, factors in _GROUPS:
        factor = source.choice(factors)
        if step_codes.ISOLATE in group and setup.max_order == MAX_PAGE_ORDER:
            factor = source.choice((1, 4, 8))
        for op in group:
            weights[op] = WEIGHTS[op] * factor * source.choice((1, 1, 2))
    return weights


def flush_steps(setup: Setup) -> list[Row]:
    """Return steps, as rows of the log, that report all free blocks to a host that zeroes them.

    By single steps alone, drawn in any order, most of a guest is seldom known to be zero, and more
    of what can go wrong with a mark needs several at the same time.
    """
    rows: list[Row] = []
    for order in range(min(setup.pages.bit_length() - 1, MAX_PAGE_ORDER), setup.reporting_order - 1, -1):
        for migratetype in range(3):
            batch: list[Row] = [(step_codes.REPORT_FILL, order, migratetype, 0)]
            batch.append((step_codes.REPORT_SEND, 0, 0, 0))
            batch += [(step_codes.REPORT_ANSWER, at, step_codes.ZEROES, 0) for at in range(setup.capacity)]
            batch.append((step_codes.REPORT_DRAIN, 1, 0, 0))
            rows += batch * max(min(setup.pages >> order, 4) // setup.capacity, 1)
    return rows


class AllocatorSearch:
    """Random steps on small guests, checked by the oracle one by one."""

    name = "allocator"
    title = "random steps of the allocator, its reporting and its balloon, on small guests"

    def prepare(self) -> None:
        """Compile the loops."""
        mem, scene = new_guest(Setup(pages=16))
        log = np.full(4, 0, dtype=np.int64)
        loop = _loop(Setup())
        loop[TOTAL] = 1
        weights = np.full(step_codes.NR_OPS, 0, dtype=np.int64)
        weights[step_codes.DRAIN] = 1
        run_steps(mem, scene, loop, weights, log, np.full(4, 0, dtype=np.int64), 0)
        run_log(mem, scene, log, loop, 0, True)

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Run episodes until something is found or the time is up."""
        findings = Findings(self.name)
        started = time.perf_counter()
        looping = 0.0
        episode = 0
        while time.perf_counter() - started < limits.seconds and findings.recording is None:
            source = random.Random(f"{seed} {episode}")
            setup = draw_setup(source, limits.pages)
            episode += 1
            mem, scene = new_guest(setup)
            loop, weights = _loop(setup), draw_weights(source, setup)
            loop[TOTAL] = weights.sum()
            loop[UNIFORM] = int(setup.max_order == MAX_PAGE_ORDER and setup.owners <= 8)
            scene.ctl[STATE] = source.getrandbits(62) | 1
            log = np.full(4 * _EPISODE, 0, dtype=np.int64)
            row = np.full(4, 0, dtype=np.int64)
            chunk = _CHUNK_LARGE if setup.pages >= 1024 else _CHUNK
            flush, flushes = flush_steps(setup), source.choice(_FLUSHES)
            done = 0
            while done < _EPISODE and time.perf_counter() - started < limits.seconds:
                begun = time.perf_counter()
                if source.random() < flushes:
                    found = _found(mem, scene, lambda: _append(mem, scene, loop, log, flush))  # noqa: B023
                else:
                    found = _found(mem, scene, lambda: run_steps(mem, scene, loop, weights, log, row, chunk))  # noqa: B023
                looping += time.perf_counter() - begun
                findings.operations += int(loop[COUNT]) - done
                done = int(loop[COUNT])
                if found is not None:
                    findings.found_after = findings.operations
                    findings.recording = self._record(setup, log[: 4 * done], found, findings)
                    break
                progress(findings.operations, None, findings.rows + _rows(scene))
            findings.rows += _rows(scene)
        findings.seconds = time.perf_counter() - started
        if looping:
            rate = findings.operations / looping
            findings.notes.append(f"{episode} guests, {rate:,.0f} checked steps a second")
        return findings

    def replay(self, recording: Recording) -> Violation | None:
        """Run a recording again; the page's events are noted on the way."""
        setup = Setup.from_json(recording.setup)
        found = replay_steps(setup, recording.steps)
        if found is None or found.pfn is None:
            return found
        return found.with_history(history_of(setup, recording.steps, found.pfn))

    def _record(
        self, setup: Setup, log: NDArray[np.int64], found: Violation, findings: Findings
    ) -> Recording:
        taken = [step_of(*(int(value) for value in log[at : at + 4])) for at in range(0, len(log), 4)]
        return record(self.name, setup, taken, found, findings)


def record(
    search: str, setup: Setup, taken: Sequence[Step], found: Violation, findings: Findings
) -> Recording:
    """Make what was found short, and tell the story of its page."""
    deadline = time.perf_counter() + _SHRINKING
    deep = False

    def fails(candidate: Sequence[Step]) -> bool:
        if time.perf_counter() > deadline:
            return False
        again = replay_steps(setup, candidate, deep=deep)
        return again is not None and (again.kind, again.what) == (found.kind, found.what)

    short: list[Step] = list(taken)
    # A look at everything after each step takes long, and is seldom what found it.
    deep = not fails(short)
    before: list[Step] = []
    while short != before and fails(short):
        before = short
        # An owner's smaller number makes others' steps superfluous: go round until nothing changes.
        short = shrink_arguments(shrink_steps(short, fails), fails)
    if time.perf_counter() > deadline:
        findings.notes.append(f"shrinking was cut short after {_SHRINKING:.0f} seconds")
    again = replay_steps(setup, short) or found
    if again.pfn is not None:
        again = again.with_history(history_of(setup, short, again.pfn))
    return Recording(search, setup.to_json(), tuple(short), again)


def replay_steps(setup: Setup, taken: Sequence[Step], *, deep: bool = True) -> Violation | None:
    """Do steps on a new guest, looking at everything after each if `deep`; return what is found.

    Steps that are not possible are passed over.

    Raises:
        UsageError: a step is none of this guest's.
    """
    actions = [action_of(step, setup) for step in taken]
    log = np.array(actions, dtype=np.int64).reshape(-1)
    mem, scene = new_guest(setup)
    loop = _loop(setup)
    return _found(mem, scene, lambda: run_log(mem, scene, log, loop, len(actions), deep))


def history_of(setup: Setup, taken: Sequence[Step], pfn: int) -> tuple[str, ...]:
    """Return what happened to a page, step by step: each change of where it is and what is said of it."""
    mem, scene = new_guest(setup)
    loop = _loop(setup)

    def do(step: Step) -> Violation | None:
        log = np.array(action_of(step, setup), dtype=np.int64)
        return _found(mem, scene, lambda: run_log(mem, scene, log, loop, 1, True))

    return story_of(taken, do, lambda: state_of(mem, scene, pfn))


def _loop(setup: Setup) -> NDArray[np.int64]:
    loop = np.full(NR_LOOP, 0, dtype=np.int64)
    loop[MAX_ORDER] = setup.max_order
    loop[CPUS] = setup.cpus
    loop[DEEP_EVERY] = _DEEP_EVERY
    return loop


# As `run_steps` does: a step that is not possible leaves no row in the log.
def _append(
    mem: Any, scene: Any, loop: NDArray[np.int64], log: NDArray[np.int64], steps: Sequence[Row]
) -> int:
    for step in steps:
        at = 4 * int(loop[COUNT])
        if at == len(log):
            break
        log[at : at + 4] = step
        code = int(act(mem, scene, *step))
        if code != layout.NOT_NOW:
            loop[COUNT] += 1
            if code != DONE:
                return code
    return DONE


def _found(mem: Any, scene: Any, call: Any) -> Violation | None:
    try:
        code = int(call())
    except VmBug as error:
        return bug(mem, error)
    return None if code in {DONE, layout.NOT_NOW} else violation(mem, scene, code)


def _rows(scene: Any) -> Counter[str]:
    return Counter({name: int(count) for name, count in zip(ROWS, scene.rows, strict=False) if count})
