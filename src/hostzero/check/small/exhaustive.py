# SPDX-License-Identifier: GPL-2.0-only
"""The exhaustive search: every state of guests of 16 and 32 pages, in every order of steps.

`scopes` says which guests; `explore` goes through a guest's states breadth first, so that what it
finds is a shortest counterexample in that scope. Scopes take turns: in each round every scope that
is open may visit a few times as many states as in the round before. So a scope is closed as soon as
it can be, the large ones share what time is left, and a bug that is near is found before any large
scope is gone through, with the compiler off too.

Symmetry is used in one place: owners are known by their blocks and not by number (`scene_state`).
Counters of events are no state (`guest_state`). Nothing else is taken to be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Final

from hostzero.check.recording import Recording, Step
from hostzero.check.search import Findings, Limits, Progress
from hostzero.check.small import scene_state, small_guest
from hostzero.check.small.explore import Exploration, World, bug_violation, expand
from hostzero.check.small.layout import DONE, NOT_NOW, ROWS
from hostzero.check.small.oracle import check_all
from hostzero.check.small.scopes import OF_A_PAGE, SCOPES, Scope
from hostzero.check.small.small_guest import Setup
from hostzero.check.small.steps import act
from hostzero.check.small.story import story_of
from hostzero.check.violation import Violation
from hostzero.errors import HostzeroError

MAX_BYTES: Final = 2 << 30
"""Memory for the states of all scopes together."""
_MAX_PAGES: Final = 1024
"""Larger guests are not gone through: for those who ask for one, the scopes stay as they are."""
_FIRST_ROUND: Final = 100  # states a scope may visit
_GROWTH: Final = 3  # how many times as many it may have visited after the next round
_CALL: Final = 0.1  # seconds that one call of the inner loop should take: Ctrl-C waits that long


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
    state_of = staticmethod(small_guest.state_of)
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
            keep = [step[0] not in OF_A_PAGE or step[1] in scope.breaking for step in steps]
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
        mem, scene = self._world.new_guest(self._scopes[0].setup)
        self._do(mem, scene, (0, 0, 0, 0))

    def run(self, limits: Limits, seed: int, progress: Progress) -> Findings:
        """Go through the scopes in turns; `seed` changes nothing."""
        started = perf_counter()
        runs = [_Run(scope, self._world, self._loop) for scope in self._chosen(limits.pages)]
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
        return self._again(setup, recording.steps)

    def _again(self, setup: Any, steps: Sequence[Step]) -> Violation | None:
        # The first time shows which page it is about, the second what happened to it.
        found: Violation | None = None
        mem, scene = self._begin(setup)
        for action in [self._world.action_of(step, setup) for step in steps]:
            found = self._do(mem, scene, action)
            if found is not None:
                break
        if found is None or found.pfn is None:
            return found
        pfn = found.pfn
        mem, scene = self._begin(setup)
        history = story_of(
            steps,
            lambda step: self._do(mem, scene, self._world.action_of(step, setup)),
            lambda: self._world.state_of(mem, scene, pfn),
        )
        return found.with_history(history)

    def _begin(self, setup: Any) -> tuple[Any, Any]:
        mem, scene = self._world.new_guest(setup)
        self._world.normal_form(mem, scene)
        return mem, scene

    def _do(self, mem: Any, scene: Any, action: tuple[int, int, int, int]) -> Violation | None:
        # A step that is not possible is passed over.
        world = self._world
        try:
            code = int(world.act(mem, scene, *action))
            if code == DONE:
                world.normal_form(mem, scene)
                code = int(world.check_all(mem, scene))
        except HostzeroError as error:
            return bug_violation(world, mem, error)
        if code in {DONE, NOT_NOW}:
            return None
        found: Violation = world.violation(mem, scene, code)
        return found

    def _chosen(self, pages: int | None) -> list[Scope]:
        # Some scopes are the same guest but for its size.
        if pages is None or pages > _MAX_PAGES:
            return list(self._scopes)
        chosen: list[Scope] = []
        for scope in self._scopes:
            resized = replace(scope, setup=replace(scope.setup, pages=pages))
            if all(resized.setup != other.setup for other in chosen):
                chosen.append(resized)
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
        setup = run.scope.setup
        violation = self._again(setup, found.steps) or found.violation
        findings.recording = Recording(self.name, setup.to_json(), found.steps, violation)
        findings.found_after = findings.operations
