# SPDX-License-Identifier: GPL-2.0-only
"""Warming up: done once, announced truly, marked only when complete, and really complete."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from hostzero import warmup
from hostzero.ram import Ram, open_ram

STEPS = 7

AFTER_A_WARM_UP = """
import sys
from numba.core import event
from numba.core.registry import CPUDispatcher
from hostzero import jit, warmup

def entered():
    # What Python has entered: compiled code that only compiled code calls is linked into its caller.
    return {
        (function.__name__, str(signature))
        for name, module in list(sys.modules.items()) if name.startswith("hostzero")
        for function in vars(module).values() if isinstance(function, CPUDispatcher)
        for signature in function.overloads
    }

class Compiling(event.Listener):
    def on_start(self, e): compiled.append(e.data["dispatcher"].__name__)
    def on_end(self, e): pass

really_warm, jit.is_warm = jit.is_warm, lambda: False
warmup.warm_up(lambda title, steps: None, lambda what: None)
jit.is_warm = really_warm
assert jit.is_warm()
before, compiled = entered(), []
event.register("numba:compile", Compiling())

from hostzero.bench import allocator, run
from hostzero.bench.options import BenchOptions
from hostzero.bench.progress import Silent
allocator.MEMORY, allocator.SIZE = 128 << 20, 16 << 20
allocator._ORDER0_BLOCKS = allocator._MEMSET_PAGES = 1024
allocator._ORDER9_BLOCKS = 8
options = BenchOptions(memory=80 << 20, size=8 << 20, repetitions=1)
options.validate()
run.run_bench(options, Silent())
allocator.run_allocator(1, Silent())
print(len(before) > 10, sorted(entered() - before), compiled)
"""


class Marks:
    """Stands for the mark on disk, and notes what happened when it was set."""

    def __init__(self) -> None:
        self.warm = False
        self.titles: list[tuple[str, int]] = []
        self.steps: list[str] = []
        self.marked_after: list[int] = []
        self.fail_at = -1
        self.rams: list[Ram] = []

    def begin(self, title: str, steps: int) -> None:
        self.titles.append((title, steps))

    def step(self, what: str) -> None:
        if len(self.steps) == self.fail_at:
            raise KeyboardInterrupt
        self.steps.append(what)

    def mark_warm(self) -> None:
        self.marked_after.append(len(self.steps))

    def open_ram(self, *args: Any) -> Ram:
        self.rams.append(open_ram(*args))
        return self.rams[-1]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Marks:
    marks = Marks()
    monkeypatch.setattr("hostzero.jit.is_warm", lambda: marks.warm)
    monkeypatch.setattr("hostzero.jit.mark_warm", marks.mark_warm)
    monkeypatch.setattr("hostzero.machine.open_ram", marks.open_ram)
    return marks


def test_nothing_is_done_when_everything_is_compiled(marks: Marks) -> None:
    marks.warm = True
    warmup.warm_up(marks.begin, marks.step)
    assert (marks.titles, marks.steps, marks.marked_after, marks.rams) == ([], [], [], [])


@pytest.mark.compiled_only
def test_as_many_steps_as_announced_and_then_the_mark(marks: Marks) -> None:
    warmup.warm_up(marks.begin, marks.step)
    assert marks.titles == [("compiling, once for this version", STEPS)]
    assert len(marks.steps) == len(set(marks.steps)) == STEPS
    assert marks.marked_after == [STEPS]
    assert [ram.closed for ram in marks.rams] == [True]


@pytest.mark.compiled_only
@pytest.mark.parametrize("step", range(STEPS))
def test_a_warm_up_that_was_interrupted_is_not_marked(marks: Marks, step: int) -> None:
    marks.fail_at = step
    with pytest.raises(KeyboardInterrupt):
        warmup.warm_up(marks.begin, marks.step)
    assert (len(marks.steps), marks.marked_after) == (step, [])
    assert [ram.closed for ram in marks.rams] == [True]


@pytest.mark.compiled_only
def test_the_benchmark_compiles_nothing_after_a_warm_up() -> None:
    """In a process of its own, since this one has entered everything.

    A cache on disk hides what a warm-up left out, once it has been compiled later. So it is
    compared which functions were entered before and after.
    """
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_WARM_UP], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True [] []\n", "", 0)
