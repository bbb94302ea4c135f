# SPDX-License-Identifier: GPL-2.0-only
"""The exhaustive search: every state of guests of 16 and 32 pages, in every order of steps.

A *scope* is a small guest and the actors that take part in it. Nobody can try everything at once,
so each scope is narrow enough to be closed, or close to it, and together they let every actor meet
every other. `explore` goes through a scope's states breadth first; what it finds is a shortest
counterexample of that scope.

Scopes take turns: in each round every scope that is open may visit a few times as many states as in
the round before. So a scope is closed as soon as it can be, the large ones share what time is left,
and a bug that is near is found before any large scope is gone through, with the compiler off too.

Symmetry is used in one place: owners are known by their blocks and not by number (`scene_state`).
Counters of events are no state (`guest_state`). Nothing else is taken to be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final

from hostzero.check import scene_state, small_guest
from hostzero.check.explore import Exploration, World, bug_violation, expand
from hostzero.check.oracle import NOT_NOW, ROWS, check_all
from hostzero.check.recording import Recording
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.small_guest import Setup
from hostzero.check.steps import act
from hostzero.check.violation import Violation
from hostzero.errors import HostzeroError

MAX_BYTES: Final = 2 << 30
"""Memory for the states of all scopes together."""
_FIRST_ROUND: Final = 100  # states a scope may visit
_GROWTH: Final = 3  # how many times as many it may have visited after the next round
_CALL: Final = 0.1  # seconds that one call of the inner loop should take: Ctrl-C waits that long


@dataclass(frozen=True)
class Scope:
    """A small guest, and what is to be learned from it.

    Attributes:
        name: what it is called in notes.
        about: what interleaves in it, in one sentence.
        setup: how it is made.
        breaking: the pages that may break; None for all. Each that does doubles the states.
    """

    name: str
    about: str
    setup: Any
    breaking: tuple[int, ...] | None = None


_ALLOCATOR: Final = ("alloc", "free", "drain")
_REPORT: Final = ("report-fill", "report-send", "report-answer", "report-drain")
_BALLOON: Final = ("balloon-take", "balloon-answer", "balloon-ack", "balloon-leave", "balloon-free")
_FAILURE: Final = ("break", "break-handle", "break-mend")

_OF_A_PAGE: Final = ("break", "break-mend")

_TINY: Final = Setup(
    pages=16,
    reporting_order=3,
    capacity=1,
    balloon=0,
    owners=1,
    max_order=4,
    reclaim=False,
    pcp_high=2,
    pcp_batch=1,
    kinds=(15, 2),  # all that an allocation can be told, zeros among it; a movable page as it is
    hows=(1, 3),  # dirty; cleared and freed as known to be zero
    actors=_ALLOCATOR,
)
_BUDDY: Final = replace(_TINY, pcp_high=1)
"""Nothing stays on a CPU's list: only the free lists are left."""

SCOPES: Final[tuple[Scope, ...]] = (
    Scope(
        "owners",
        "an owner leaves its block in every way: clean, dirty, with flags, as zero, shared",
        replace(_TINY, kinds=(0, 2, 15), hows=(0, 1, 2, 3, 4, 5)),
    ),
    Scope(
        "unchecked owners",
        "the same without the allocator's own checks: an owner's PG_private comes back with its block",
        replace(_TINY, debug_vm=False, hows=(1, 2, 3)),
    ),
    Scope(
        "report", "each step of a report, an owner, and a drain", replace(_BUDDY, actors=_ALLOCATOR + _REPORT)
    ),
    Scope(
        "report and CPUs",
        "each step of a report, and two CPUs that allocate, free, park and drain",
        replace(_TINY, cpus=2, max_order=0, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "trust",
        "the host's word is believed or not, and all of memory is lost in hibernation, between reports",
        replace(_BUDDY, max_order=1, actors=(*_ALLOCATOR, *_REPORT, "trust", "hibernate")),
    ),
    Scope(
        "balloon",
        "two balloon pages in flight, answered in any order, deflated, and an owner",
        replace(_TINY, balloon=2, max_order=0, actors=_ALLOCATOR + _BALLOON),
    ),
    Scope(
        "balloon and report",
        "a balloon page in flight during a report",
        replace(_BUDDY, balloon=1, max_order=0, actors=_ALLOCATOR + _BALLOON + _REPORT),
    ),
    Scope(
        "failure",
        "a page breaks, is dealt with later, and is mended, wherever it is",
        replace(_TINY, max_order=2, actors=_ALLOCATOR + _FAILURE),
        breaking=(5,),
    ),
    Scope(
        "failure and report",
        "a page breaks while its block is reported",
        replace(_BUDDY, max_order=1, actors=_ALLOCATOR + _REPORT + _FAILURE),
        breaking=(9,),
    ),
    Scope(
        "failure and balloon",
        "a page breaks while it is in the balloon, or on its way there or back",
        replace(_BUDDY, balloon=1, max_order=0, actors=_ALLOCATOR + _BALLOON + _FAILURE),
        breaking=(0,),
    ),
    Scope(
        "poisoning",
        "free pages hold a pattern, with reports and a balloon",
        replace(_TINY, poisoning=True, balloon=1, actors=_ALLOCATOR + _REPORT + _BALLOON),
    ),
    Scope(
        "init_on_free",
        "free pages are zeroed, with reports and a balloon",
        replace(_TINY, init_on_free=True, balloon=1, actors=_ALLOCATOR + _REPORT + _BALLOON),
    ),
    Scope(
        "init_on_alloc",
        "every allocation is zeroed, with reports",
        replace(_BUDDY, init_on_alloc=True, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "deferred frees",
        "blocks are freed under the zone's lock and wait",
        replace(_BUDDY, max_order=1, hows=(1, 3, 6)),
    ),
    Scope(
        "placement",
        "blocks are chosen by whether they are zero as wanted",
        replace(_BUDDY, zero_aware=True, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "reports, two blocks",
        "two blocks in a batch, answered in any order",
        replace(_BUDDY, capacity=2, max_order=3, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "migrate types",
        "movable and unmovable owners take each other's pageblock",
        replace(_TINY, owners=2, max_order=1, kinds=(0, 1, 2, 15)),
    ),
    Scope(
        "reports and two owners",
        "each step of a report, and two owners of blocks of up to 4 pages",
        replace(_BUDDY, owners=2, max_order=2, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "32 pages",
        "each step of a report, and an owner",
        replace(_BUDDY, pages=32, reporting_order=4, max_order=5, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "32 pages, smaller blocks",
        "the same, reported by blocks of 8 pages, two at a time",
        replace(_BUDDY, pages=32, capacity=2, max_order=5, actors=_ALLOCATOR + _REPORT),
    ),
    Scope(
        "two CPUs and two owners",
        "blocks of one and two pages are parked, drained, split and merged",
        replace(_TINY, cpus=2, owners=2, max_order=1),
    ),
    Scope(
        "all actors, 16 pages",
        "everything at once, as deep as time allows",
        Setup(pages=16, cpus=2, balloon=2, owners=3, capacity=2, pcp_high=4),
    ),
    Scope(
        "all actors, 32 pages",
        "everything at once, as deep as time allows",
        Setup(pages=32, cpus=2, balloon=2, owners=3, capacity=2, max_order=5, pcp_high=4),
    ),
)


class SmallGuests:
    """The world of the small guests, as `explore` wants it."""

    new_guest = staticmethod(small_guest.new_guest)
    actions = staticmethod(small_guest.actions)
    violation = staticmethod(small_guest.violation)
    step_of = staticmethod(small_guest.step_of)
    action_of = staticmethod(small_guest.action_of)
    normal_form = staticmethod(scene_state.normal_form)
    state_words = staticmethod(scene_state.state_words)
    bug = staticmethod(small_guest.bug)
    act = staticmethod(act)
    check_all = staticmethod(check_all)
    rows = ROWS
    setup_from_json = staticmethod(Setup.from_json)


class _Run:
    """One scope, as far as it has been gone through."""

    def __init__(self, scope: Scope, world: World, loop: Callable[..., int]) -> None:
        self.scope = scope
        actions = world.actions(scope.setup)
        if scope.breaking is not None:
            steps = [world.step_of(*(int(value) for value in action)) for action in actions]
            keep = [step[0] not in _OF_A_PAGE or step[1] in scope.breaking for step in steps]
            actions = actions[keep]
        self.exploration = Exploration(world, scope.setup, loop, actions)
        self.seconds = 0.0
        self.stopped = ""  # why, if it is not closed
        self._portion = 1

    @property
    def over(self) -> bool:
        return bool(self.stopped) or self.exploration.closed or self.exploration.found is not None

    def advance(self, max_bytes: int) -> None:
        """Go on for about a tenth of a second."""
        started = perf_counter()
        if not self.exploration.advance(self._portion, max_bytes):
            self.stopped = "the memory for states is used up"
        took = perf_counter() - started
        self.seconds += took
        if took < _CALL / 2:
            self._portion *= 2
        elif took > 2 * _CALL:
            self._portion = max(self._portion // 2, 1)

    def note(self) -> str:
        """Return what there is to say about the scope, on one line."""
        search = self.exploration
        if search.closed:
            end = f"closed at depth {search.depth}"
        elif search.found is not None:
            end = f"found something at depth {search.depth + 1}"
        else:
            end = f"all sequences of {search.depth} steps, then {self.stopped or 'the time was up'}"
        return (
            f"{self.scope.name} ({self.scope.setup.pages} pages): {search.states:,} states, "
            f"{search.transitions:,} steps, {end}, {self.seconds:.1f} s"
        )


class ExhaustiveSearch:
    """Every state that small guests can reach (`Search`)."""

    name = "exhaustive"
    title = "every order of steps in guests of 16 and 32 pages"

    def __init__(
        self,
        scopes: Sequence[Scope] = SCOPES,
        world: Any = SmallGuests,
        loop: Callable[..., int] = expand,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Choose what to go through; as it stands, everything.

        Args:
            scopes: the guests, small ones first.
            world: their rules.
            loop: the inner loop that does their steps.
            max_bytes: memory for states.
        """
        self._scopes = scopes
        self._world = world
        self._loop = loop
        self._max_bytes = max_bytes

    def prepare(self) -> None:
        """Compile the inner loop."""
        Exploration(self._world, self._scopes[0].setup, self._loop).advance(1, self._max_bytes)
        self.replay_steps(self._scopes[0].setup, [])

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Go through the scopes in turns; `seed` changes nothing."""
        started = perf_counter()
        runs = [_Run(scope, self._world, self._loop) for scope in self._chosen(limits)]
        findings = Findings(self.name)
        end = started + limits.seconds
        allowed = _FIRST_ROUND
        going = True
        while going and not all(run.over for run in runs):
            for run in runs:
                going = self._take_turn(run, runs, findings, allowed, end, limits.depth, progress)
                if not going:
                    break
            allowed *= _GROWTH
        for run in runs:
            run.exploration.check_untouched()
        self._count(findings, runs)
        findings.seconds = perf_counter() - started
        searched = max(sum(run.seconds for run in runs), 1e-9)
        findings.notes = [run.note() for run in runs]
        findings.notes.append(
            f"{(findings.states or 0) / searched:,.0f} new states a second, "
            f"{findings.operations / searched:,.0f} checked steps a second"
        )
        return findings

    def _take_turn(
        self,
        run: _Run,
        runs: Sequence[_Run],
        findings: Findings,
        allowed: int,
        end: float,
        depth: int | None,
        progress: Progress,
    ) -> bool:
        # One scope up to `allowed` states; False if the search is over.
        while not run.over and run.exploration.states < allowed:
            if depth is not None and run.exploration.depth >= depth:
                run.stopped = "the depth asked for was reached"
                break
            if perf_counter() >= end:
                return False
            others = sum(other.exploration.nbytes for other in runs if other is not run)
            run.advance(self._max_bytes - others)
            self._count(findings, runs)
            progress(findings.operations, findings.states, findings.rows, run.scope.name)
        if run.exploration.found is not None:
            self._record(findings, run)
            return False
        if run.over:
            run.exploration.forget_states()
        return True

    def replay(self, recording: Recording) -> Violation | None:
        """Run a recording again; return what is found, or None.

        Raises:
            UsageError: the recording's setup or steps are none of this search's.
        """
        setup = self._world.setup_from_json(recording.setup)
        return self.replay_steps(setup, [self._world.action_of(step, setup) for step in recording.steps])

    def replay_steps(self, setup: Any, actions: Sequence[tuple[int, int, int, int]]) -> Violation | None:
        """Do actions one after the other; return the first violation. Those not possible are left out."""
        world = self._world
        mem, scene = world.new_guest(setup)
        world.normal_form(mem, scene)
        for action in actions:
            try:
                code = int(world.act(mem, scene, *action))
                if code == NOT_NOW:
                    continue
                if code == 0:
                    world.normal_form(mem, scene)
                    code = int(world.check_all(mem, scene))
            except HostzeroError as error:
                return bug_violation(world, mem, error)
            if code:
                found: Violation = world.violation(mem, scene, code)
                return found
        return None

    def _chosen(self, limits: Limits) -> list[Scope]:
        chosen: list[Scope] = []
        for scope in self._scopes:
            if limits.pages is not None:
                scope = replace(scope, setup=replace(scope.setup, pages=limits.pages))
                if any(scope.setup == other.setup for other in chosen):
                    continue
            chosen.append(scope)
        return chosen

    def _count(self, findings: Findings, runs: Sequence[_Run]) -> None:
        findings.operations = sum(run.exploration.transitions for run in runs)
        findings.states = sum(run.exploration.states for run in runs)
        rows: Counter[str] = Counter()
        for run in runs:
            for name, count in zip(self._world.rows, run.exploration.rows, strict=False):
                rows[name] += int(count)
        findings.rows = +rows

    def _record(self, findings: Findings, run: _Run) -> None:
        found = run.exploration.found
        assert found is not None
        findings.recording = Recording(self.name, run.scope.setup.to_json(), found.steps, found.violation)
        findings.found_after = findings.operations
