# SPDX-License-Identifier: GPL-2.0-only
"""A progress that remembers what it was told, and that can interrupt like Ctrl-C."""

from __future__ import annotations


class Recorder:
    """Notes scenarios and their steps; raises at step `interrupt_at` of a scenario, counted from 1.

    Compiling comes first where nothing is compiled yet, and is not noted.
    """

    def __init__(self, interrupt_at: int = -1) -> None:
        self.scenarios: list[tuple[str, int]] = []
        self.steps: list[list[str]] = []
        self._compiling = False
        self._interrupt_at = interrupt_at

    def scenario(self, name: str, steps: int) -> None:
        self._compiling = name.startswith("compiling")
        if not self._compiling:
            self.scenarios.append((name, steps))
            self.steps.append([])

    def step(self, what: str) -> None:
        if self._compiling:
            return
        self.steps[-1].append(what)
        if len(self.steps[-1]) == self._interrupt_at:
            raise KeyboardInterrupt
