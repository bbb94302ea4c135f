# SPDX-License-Identifier: GPL-2.0-only
"""From a case to a result."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from hostzero.conform.case import Case
from hostzero.conform.in_process import InProcessConnection, InProcessTarget
from hostzero.conform.judge import Level
from hostzero.conform.result import Outcome, Result
from hostzero.conform.rig import Rig
from hostzero.conform.run import run_case, run_suite
from hostzero.conform.target import Ability
from hostzero.errors import DeviceError, TargetError, UsageError
from hostzero.termination import Terminated, terminable
from hostzero.units import Gpa
from hostzero.virtio.features import Feature
from tests.conform.wrong import balloon
from tests.conform.wrong.device import WrongTarget


def a_case(run: object, offers: Feature | None = None, needs: tuple[Ability, ...] = ()) -> Case:
    return Case("test", "a case", "9.9", __name__, run, offers or Feature(0), needs)  # type: ignore[arg-type]


def outcome_of(run: object) -> Result:
    return run_case(InProcessTarget(), a_case(run))


def test_a_case_that_says_nothing_passes_and_takes_time() -> None:
    ticks = iter((10.0, 12.5))
    result = run_case(InProcessTarget(), a_case(lambda rig: rig.start()), clock=lambda: next(ticks))
    assert result.outcome is Outcome.PASS
    assert result.seconds == 2.5
    assert result.transcript[-1] == "-> DRIVER_OK"


def test_a_missed_should_goes_on_and_is_reported() -> None:
    result = outcome_of(lambda rig: rig.judge.should(False, "better"))
    assert result.outcome is Outcome.SHOULD
    assert result.misses[0].clause == "9.9"


def test_a_failure_keeps_the_shoulds_before_it() -> None:
    def run(rig: Rig) -> None:
        rig.judge.should(False, "better")
        rig.judge.fail("worse")

    assert [miss.text for miss in outcome_of(run).misses] == ["worse", "better"]


def test_memory_is_looked_at_after_every_case() -> None:
    result = outcome_of(lambda rig: rig.ram.memory.write(Gpa(rig.ram.data.start), b"!"))
    assert result.outcome is Outcome.FAIL
    assert result.level is Level.SAFETY


def test_a_refusal_of_a_legal_call_is_a_failure() -> None:
    def run(rig: Rig) -> None:
        raise DeviceError("no")

    result = outcome_of(run)
    assert result.outcome is Outcome.FAIL
    assert "refused a legal call: no" in result.misses[0].text


def test_a_device_that_goes_away_is_a_failure_of_safety() -> None:
    def run(rig: Rig) -> None:
        raise TargetError("connection reset")

    assert outcome_of(run).level is Level.SAFETY


def test_what_is_not_offered_does_not_apply() -> None:
    result = run_case(InProcessTarget(), a_case(lambda rig: 1 / 0, Feature.ACCESS_PLATFORM))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert result.reason == "access-platform is not offered"


def test_what_the_target_cannot_do_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InProcessConnection, "missing", {Ability.HINT: "no host here"})
    result = run_case(InProcessTarget(), a_case(lambda rig: 1 / 0, needs=(Ability.HINT,)))
    assert result.outcome is Outcome.NOT_APPLICABLE
    assert result.reason == "no host here"


def test_a_target_that_cannot_be_reached_ends_the_run() -> None:
    class Nowhere(InProcessTarget):
        def connect(self) -> InProcessConnection:
            raise UsageError("nobody listens")

    with pytest.raises(UsageError, match="nobody"):
        run_suite(Nowhere(), [a_case(lambda rig: None)])


def test_a_target_that_is_gone_after_a_case_leaves_the_rest_not_run() -> None:
    class Mortal(InProcessTarget):
        left = 2

        def connect(self) -> InProcessConnection:
            if not self.left:
                raise UsageError("nobody listens")
            self.left -= 1
            return super().connect()

    def dies(rig: Rig) -> None:
        raise TargetError("connection reset")

    cases = [a_case(run) for run in (lambda rig: None, dies, lambda rig: None, lambda rig: None)]
    report = run_suite(Mortal(), cases)
    assert [result.outcome for result in report.results] == [
        Outcome.PASS,
        Outcome.FAIL,
        Outcome.NOT_RUN,
        Outcome.NOT_RUN,
    ]
    assert report.results[-1].reason == "the target is gone: nobody listens"
    assert not report.ok
    assert report.signal == 0


def sends(number: int) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_judged(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminable():
            report = run_suite(
                InProcessTarget(), [a_case(lambda rig: None), a_case(sends(number)), a_case(lambda rig: None)]
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert [result.outcome for result in report.results] == [Outcome.PASS, Outcome.NOT_RUN, Outcome.NOT_RUN]
    assert report.results[-1].reason == f"{number.name} ended the run"
    assert report.signal == number


def test_a_signal_before_anything_was_judged_has_no_report() -> None:
    with pytest.raises(Terminated), terminable():
        run_suite(InProcessTarget(), [a_case(sends(signal.SIGTERM))])


def test_a_run_reports_every_case_and_tells_of_each() -> None:
    from hostzero.conform.suite import select

    told: list[str] = []

    class Listener:
        def began(self, case: Case) -> None:
            told.append(f"began {case.id}")

        def ended(self, result: Result) -> None:
            told.append(f"ended {result.case.id} {result.outcome.value}")

    cases = select(["inflate-one", "deflate-one"])
    known = {"inflate-one": "silent by design"}
    report = run_suite(WrongTarget(balloon.silent_inflate), cases, known=known, progress=Listener())
    assert told == [
        "began inflate-one",
        "ended inflate-one fail",
        "began deflate-one",
        "ended deflate-one fail",
    ]
    assert [result.outcome for result in report.results] == [Outcome.KNOWN, Outcome.FAIL]
    assert report.facts["device"].startswith("hostzero ")
