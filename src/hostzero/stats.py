# SPDX-License-Identifier: GPL-2.0-only
"""The statistics behind every number shown: summaries of one arm, ratios of two."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """One series of repetitions, in the unit it was measured in."""

    n: int
    mean: float
    stdev: float | None
    """Sample standard deviation (divisor n - 1); None for a single value."""
    median: float
    minimum: float
    maximum: float


def summarize(values: Sequence[float]) -> Summary:
    """Return the summary of a series.

    Raises:
        ValueError: the series is empty.
    """
    if not values:
        raise ValueError("nothing to summarize: the series is empty")
    return Summary(
        n=len(values),
        mean=statistics.fmean(values),
        stdev=statistics.stdev(values) if len(values) > 1 else None,
        median=statistics.median(values),
        minimum=min(values),
        maximum=max(values),
    )


class PairedRatio(NamedTuple):
    """How one arm compares with another over repetitions that ran side by side."""

    ratio: float | None
    """Geometric mean of the pairs' ratios; None when no pair has one."""
    ci95: tuple[float, float] | None
    """95 % interval of that mean; None for fewer than two usable pairs."""
    n: int
    """Pairs that the ratio is made of."""
    zeros: int
    """Pairs left out because a value was zero: they have no ratio."""


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> PairedRatio:
    """Return the ratio of two arms, repetition by repetition.

    Repetition i of both arms ran shortly after one another, so slow drift of the
    machine falls on both and leaves their ratio. Ratios multiply, so their logarithms
    are averaged: the result is the geometric mean, and the interval is Student's t
    interval of the mean logarithm (n - 1 degrees of freedom), taken back by `exp`.
    It supposes that the logarithms are roughly normal and the pairs independent.

    A pair with a zero on either side has no logarithm. It is left out and counted in
    `zeros`, never replaced by a small number, which could make the ratio anything.

    Raises:
        ValueError: the series differ in length, or a value is negative or not finite.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"pairs need series of one length, not {len(numerators)} and {len(denominators)}")
    for value in (*numerators, *denominators):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"a measured value cannot be {value}")
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True) if a > 0 and b > 0]
    zeros = len(numerators) - len(logs)
    if not logs:
        return PairedRatio(None, None, 0, zeros)
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return PairedRatio(math.exp(mean), None, 1, zeros)
    half = _t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return PairedRatio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)), len(logs), zeros)


def _t_quantile(degrees: int) -> float:
    # Imported here: scipy costs a tenth of a second that options and help need not pay.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))
