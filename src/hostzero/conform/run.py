# SPDX-License-Identifier: GPL-2.0-only
"""Running cases against a target: each with a fresh device, and no case takes another with it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from hostzero.conform.case import Case
from hostzero.conform.judge import Failed, Judge, Level, Miss, NotApplicable
from hostzero.conform.known import apply_known
from hostzero.conform.result import Outcome, Report, Result
from hostzero.conform.rig import Rig
from hostzero.conform.suite import all_cases
from hostzero.conform.target import Target
from hostzero.errors import DeviceError, HostzeroError, TargetError
from hostzero.termination import Terminated
from hostzero.virtio.features import Feature, names


class Progress(Protocol):
    """Hears how far a run has come."""

    def began(self, case: Case) -> None:
        """A case begins."""

    def ended(self, result: Result) -> None:
        """A case has ended."""


class Silent:
    """Tells nobody: for callers from Python."""

    def began(self, case: Case) -> None:
        """Ignore it."""

    def ended(self, result: Result) -> None:
        """Ignore it."""


def run_suite(
    target: Target,
    cases: Iterable[Case],
    *,
    known: Mapping[str, str] | None = None,
    strict: bool = False,
    rerun: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Run cases one after the other and return what became of them.

    If the target is gone after some cases, or Ctrl-C, SIGTERM or SIGHUP ends the run (in `terminable`),
    the report has what was judged until then, and the rest as not run. `rerun` is the command line of
    this run without its cases, for the report.

    Raises:
        UsageError: the target cannot be reached at all.
        KeyboardInterrupt: Ctrl-C came before anything was judged.
        Terminated: SIGTERM or SIGHUP did.
    """
    progress = Silent() if progress is None else progress
    chosen = tuple(cases)
    results: list[Result] = []
    why, number = "", 0
    try:
        for case in chosen:
            progress.began(case)
            results.append(run_case(target, case))
            progress.ended(results[-1])
    except (HostzeroError, KeyboardInterrupt, Terminated) as error:
        if not results:
            raise
        if isinstance(error, HostzeroError):
            why = f"the target is gone: {error}"
        else:
            number = error.number if isinstance(error, Terminated) else signal.SIGINT
            why = f"{signal.Signals(number).name} ended the run"
    results += [Result(case, Outcome.NOT_RUN, reason=why) for case in chosen[len(results) :]]
    marked, stale = apply_known(results, known or {}, {case.id for case in all_cases()})
    return Report(target.name, target.describe(), marked, stale, strict, number, tuple(rerun))


def run_case(target: Target, case: Case, clock: Callable[[], float] = time.perf_counter) -> Result:
    """Run one case with a fresh device.

    Raises:
        UsageError: the target cannot be reached.
    """
    judge = Judge(case.clause)
    began = clock()
    misses: tuple[Miss, ...] = ()
    reason = ""
    try:
        _run(target, case, judge)
        outcome = Outcome.SHOULD if judge.misses else Outcome.PASS
        misses = tuple(judge.misses)
    except Failed as failed:
        outcome, misses = Outcome.FAIL, (failed.miss, *judge.misses)
    except NotApplicable as why:
        outcome, reason = Outcome.NOT_APPLICABLE, str(why)
    return Result(case, outcome, misses, reason, tuple(judge.transcript.as_lines()), clock() - began)


# What the rig cannot know is turned into a judgement here: a device that refuses a legal call, and
# one that is gone.
def _run(target: Target, case: Case, judge: Judge) -> None:
    try:
        with Rig(target, judge) as rig:
            rig.need(*case.needs)
            if case.offers:
                _need_offer(rig, case.offers)
            case.run(rig)
            rig.expect_untouched()
            judge.safe(rig.connection.alive(), "the device went away")
    except DeviceError as error:
        judge.fail(f"the device refused a legal call: {error}")
    except TargetError as error:
        raise Failed(Miss(Level.SAFETY, case.clause, f"the device went away: {error}")) from error


def _need_offer(rig: Rig, offers: Feature) -> None:
    if missing := offers & ~rig.offered():
        raise NotApplicable(
            f"{', '.join(names(missing))} {'is' if missing.bit_count() == 1 else 'are'} not offered"
        )
