# SPDX-License-Identifier: GPL-2.0-only
"""Every refusal comes before the run, as one sentence that names the option."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from hostzero.bench.names import Scenario
from hostzero.bench.options import (
    BACKINGS,
    BenchOptions,
    check_plot,
    largest_size,
    quick_options,
    size_option,
)
from hostzero.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20


def test_the_defaults_are_those_of_the_cover_letter() -> None:
    options = BenchOptions()
    assert (options.memory, options.size, options.repetitions) == (2 * GIB, 256 * MIB, 10)


@pytest.mark.parametrize("options", [BenchOptions(), quick_options()], ids=["full", "quick"])
def test_the_defaults_are_valid(options: BenchOptions) -> None:
    options.validate()


def test_backings_are_those_of_the_ram() -> None:
    """options.py repeats them so that --help need not import numpy."""
    from hostzero.ram import BACKINGS as of_the_ram

    assert tuple(of_the_ram) == BACKINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenarios": ()}, "--scenario: name at least one of thp, 4k, balloon"),
        (
            {"scenarios": ("swap",)},
            "--scenario swap: unknown; there are thp, 4k, balloon, hugetlb",
        ),
        (
            {"scenarios": (Scenario.FRAGMENTED,), "size": 514 * MIB},
            "--size 514M: --scenario fragmented asks for it several times over; at most 512M fits",
        ),
        (
            {"scenarios": (Scenario.MEMCG_LIMIT,), "memory": 80 * MIB, "size": 22 * MIB},
            "--size 22M: --scenario memcg-limit asks for it several times over; at most 20M fits",
        ),
        ({"memory": 3 * MIB}, "--memory 3M: must be a multiple of 2M above zero"),
        ({"memory": 0}, "--memory 0: must be a multiple"),
        ({"size": 2 * MIB + 1}, "--size 2097153: must be a multiple of 2M above zero"),
        ({"size": -2 * MIB}, "--size -2M: must be a multiple"),
        (
            {"size": 1538 * MIB},
            "--size 1538M: more than three quarters of --memory 2G; at most 1536M fits",
        ),
        ({"memory": 2 * MIB, "size": 2 * MIB}, "--memory 2M; at most 0 fits"),
        (
            {"memory": 70 * MIB, "size": 2 * MIB},
            "--memory 70M: a guest under 72M reports no free pages; give it more",
        ),
        (
            {"memory": 64 * MIB, "size": 46 * MIB, "scenarios": (Scenario.BALLOON,)},
            "--size 46M: with 16M beside it, too large a balloon for --memory 64M",
        ),
        ({"repetitions": 0}, "--repetitions 0: must be from 1 to 10000"),
        ({"repetitions": 10_001}, "--repetitions 10001: must be from 1 to 10000"),
        ({"seed": -1}, "--seed -1: must not be below zero"),
        ({"backing": "paper"}, "--backing paper: unknown; there are anonymous, memfd, tmpfs-huge, hugetlb"),
    ],
)
def test_options_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    options = dataclasses.replace(BenchOptions(), **change)
    with pytest.raises(UsageError, match=re.escape(message)):
        options.validate()


def test_three_quarters_of_memory_is_the_most_and_is_allowed() -> None:
    options = BenchOptions(size=largest_size(2 * GIB))
    assert options.size == 1536 * MIB
    options.validate()


def test_the_smallest_guests_are_allowed() -> None:
    """Where reporting begins, and where a balloon just leaves the reserve."""
    BenchOptions(memory=72 * MIB, size=54 * MIB, scenarios=(Scenario.THP, Scenario.SMALL_PAGES)).validate()
    BenchOptions(memory=64 * MIB, size=44 * MIB, scenarios=(Scenario.BALLOON,)).validate()


def test_the_largest_size_is_a_whole_number_of_huge_pages() -> None:
    assert largest_size(6 * MIB) == 4 * MIB


def test_memory_beyond_the_host_is_refused_with_both_figures() -> None:
    with pytest.raises(UsageError, match=r"--memory 2G: .* 2303M of memory that this host has available"):
        BenchOptions().validate_on(2304 * MIB - 1)


def test_memory_that_just_fits_the_host() -> None:
    BenchOptions().validate_on(2304 * MIB)


def test_hugetlb_is_not_measured_against_available_memory() -> None:
    """Its pool is reserved, so it is missing from what is available; opening it says what it lacks."""
    BenchOptions(backing="hugetlb").validate_on(0)


def test_config_is_plain_json() -> None:
    config = BenchOptions(scenarios=(Scenario.THP,)).to_config()
    assert config["scenarios"] == ["thp"]
    assert [type(name) for name in config["scenarios"]] == [str]
    assert config["size"] == 256 * MIB


def test_a_size_that_is_none_names_the_option() -> None:
    with pytest.raises(UsageError, match=r"^--size: 'lots' is not a size"):
        size_option("--size", "lots")
    assert size_option("--size", "4M") == 4 * MIB


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_plot(tmp_path / "out.PNG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.pdf", "out", ".png"])
def test_a_plot_of_another_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"must end in \.png or \.svg"):
        check_plot(tmp_path / name)
