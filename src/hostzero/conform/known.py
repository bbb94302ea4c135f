# SPDX-License-Identifier: GPL-2.0-only
"""The list of deviations that a target is known to have, so that CI fails on new ones only.

A TOML file, one entry a case, with the reason::

    [deviations]
    number-dense = "numbers queues over what it offers; see the tracker, 1234"

An entry whose case passes is stale, and so is one that names no case: both end a run with
status 1, so that the list never says more than is so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from hostzero.conform.result import Outcome, Result
from hostzero.errors import UsageError


def load_known(path: Path) -> dict[str, str]:
    """Return the reasons by case id.

    Raises:
        UsageError: the file cannot be read, is no TOML, or is not made as above.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--known {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--known {path}: is no TOML: {error}") from error
    deviations = document.get("deviations")
    if set(document) != {"deviations"} or not isinstance(deviations, dict):
        raise UsageError(f"--known {path}: needs one table, [deviations], and nothing else")
    for name, reason in deviations.items():
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f'--known {path}: {name} needs its reason, as in {name} = "why"')
    return deviations


def apply_known(
    results: Iterable[Result], known: Mapping[str, str], ids: Collection[str]
) -> tuple[tuple[Result, ...], dict[str, str]]:
    """Return the results with known deviations marked, and what is stale in the list, with the reason.

    Args:
        results: what became of the cases that ran.
        known: the reasons by case id.
        ids: every case that there is.
    """
    stale = {name: "there is no such case" for name in known if name not in ids}
    marked = []
    for result in results:
        name = result.case.id
        if name in known and result.outcome in {Outcome.FAIL, Outcome.SHOULD}:
            result = replace(result, outcome=Outcome.KNOWN, reason=known[name])
        elif name in known and result.outcome is Outcome.PASS:
            stale[name] = "the case passes"
        marked.append(result)
    return tuple(marked), stale
