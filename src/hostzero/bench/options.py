# SPDX-License-Identifier: GPL-2.0-only
"""What one run of the benchmark was asked for, checked before anything is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hostzero.bench.names import COUNTED, TIMED, Scenario
from hostzero.document import check_output
from hostzero.errors import UsageError
from hostzero.units import PMD_SIZE, format_size, parse_size

SCENARIOS: Final = (*TIMED, *COUNTED)
"""The scenarios that can be run."""

BACKINGS: Final = ("anonymous", "memfd", "tmpfs-huge", "hugetlb")
"""As `hostzero.ram.BACKINGS`, which costs importing numpy; a test keeps the two equal."""

PLOT_SUFFIXES: Final = (".png", ".svg")
MAX_REPETITIONS: Final = 10_000

RESERVE_SHARE: Final = 16
"""One part in so many of the guest stays unwritten: page tables, rings, watermarks."""

BALLOON_MARGIN: Final = 16 << 20
"""The balloon is this much larger than what is populated, since page tables come from it too."""

COUNTED_SHARE: Final = 4
"""The scenarios that count ask for --size up to three times at once, in a guest partly in use."""

LEAST_TO_REPORT: Final = 72 << 20
"""Reporting begins once 64 MiB, a batch of 32 huge pages, are free above the watermark and the
per-CPU lists; a smaller guest would be measured with nothing reported in any arm."""

_HOST_RESERVE: Final = 256 << 20
# What stays free on the host beside guest memory: the interpreter, mem_map, and some air.


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One run of ``hostzero bench``. `validate` must have passed before it is used."""

    scenarios: tuple[Scenario, ...] = TIMED
    memory: int = 2 << 30
    """The guest's memory, in bytes."""
    size: int = 256 << 20
    """What one process maps and populates, in bytes."""
    repetitions: int = 10
    seed: int = 0
    """Orders the arms within each repetition and picks the pages of random workloads."""
    backing: str = "anonymous"
    quick: bool = False
    """Whether the defaults were the small ones; `quick_options` makes them."""

    def validate(self) -> None:
        """Check everything that does not depend on this machine.

        Raises:
            UsageError: an option does not fit; the text names it and what would fit.
        """
        if not self.scenarios:
            raise UsageError("--scenario: name at least one of " + ", ".join(SCENARIOS))
        for scenario in self.scenarios:
            if scenario not in SCENARIOS:
                raise UsageError(f"--scenario {scenario}: unknown; there are {', '.join(SCENARIOS)}")
        for option, value in (("--memory", self.memory), ("--size", self.size)):
            if value <= 0 or value % PMD_SIZE:
                raise UsageError(f"{option} {format_size(value)}: must be a multiple of 2M above zero")
        if self.size > self.memory // 4 * 3:
            raise UsageError(
                f"--size {format_size(self.size)}: more than three quarters of --memory "
                f"{format_size(self.memory)}; at most {format_size(largest_size(self.memory))} fits"
            )
        for scenario in self.scenarios:
            self._validate_room(scenario)
        if not 1 <= self.repetitions <= MAX_REPETITIONS:
            raise UsageError(f"--repetitions {self.repetitions}: must be from 1 to {MAX_REPETITIONS}")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: must not be below zero")
        if self.backing not in BACKINGS:
            raise UsageError(f"--backing {self.backing}: unknown; there are {', '.join(BACKINGS)}")

    def _validate_room(self, scenario: Scenario) -> None:
        if scenario is not Scenario.BALLOON:
            if self.memory < LEAST_TO_REPORT:
                raise UsageError(
                    f"--memory {format_size(self.memory)}: a guest under {format_size(LEAST_TO_REPORT)} "
                    f"reports no free pages; give it more, or run only --scenario {Scenario.BALLOON}"
                )
            if scenario in COUNTED and self.size * COUNTED_SHARE > self.memory:
                raise UsageError(
                    f"--size {format_size(self.size)}: --scenario {scenario} asks for it several times over; "
                    f"at most {format_size(self.memory // COUNTED_SHARE // PMD_SIZE * PMD_SIZE)} fits "
                    f"--memory {format_size(self.memory)}"
                )
        elif self.size + BALLOON_MARGIN > self.memory - self.memory // RESERVE_SHARE:
            raise UsageError(
                f"--size {format_size(self.size)}: with {format_size(BALLOON_MARGIN)} beside it, too large "
                f"a balloon for --memory {format_size(self.memory)}"
            )

    def validate_on(self, available: int) -> None:
        """Check that the guest's memory fits into `available` bytes of this host.

        The benchmark writes all of it, so memory that the host can only promise is not enough.

        Raises:
            UsageError: it does not fit.
        """
        if self.backing == "hugetlb":
            return  # comes from its own pool; opening it says what is missing
        if self.memory + _HOST_RESERVE > available:
            raise UsageError(
                f"--memory {format_size(self.memory)}: with {format_size(_HOST_RESERVE)} beside it, more "
                f"than the {available >> 20}M of memory that this host has available"
            )

    def to_config(self) -> dict[str, object]:
        """Return the options as the ``config`` of the JSON document."""
        config = dataclasses.asdict(self)
        config["scenarios"] = [str(scenario) for scenario in self.scenarios]
        return config


def quick_options() -> BenchOptions:
    """Return the defaults of ``--quick``: one scenario, less memory, three repetitions."""
    return BenchOptions(scenarios=(Scenario.THP,), memory=1 << 30, size=128 << 20, repetitions=3, quick=True)


def largest_size(memory: int) -> int:
    """Return the largest --size that a guest of `memory` bytes allows."""
    return memory // 4 * 3 // PMD_SIZE * PMD_SIZE


def size_option(option: str, text: str) -> int:
    """Read a size given to `option`.

    Raises:
        UsageError: it is no size; the text names the option.
    """
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def check_plot(path: Path) -> None:
    """Check the file that ``--plot`` names, before anything is measured.

    Raises:
        UsageError: the suffix is neither .png nor .svg, or the file could not be written.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(PLOT_SUFFIXES)}")
    check_output("--plot", path)
