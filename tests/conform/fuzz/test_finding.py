# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import json

from hostzero.conform.fuzz.finding import Finding, Found, Kind


def test_what_is_found_says_what_and_with_which_values() -> None:
    found = Found(Kind.CLAIM, "page 0x7 is claimed zero and is not")
    assert (found.kind, str(found)) == (Kind.CLAIM, "page 0x7 is claimed zero and is not")


def test_a_finding_is_a_document() -> None:
    finding = Finding(Kind.DIED, "process 7 is gone", 3, 12, 40, ("driver: starts", "end: closed: nothing"))
    document = finding.to_json()
    assert json.loads(json.dumps(document)) == document
    assert document == {
        "kind": "died",
        "text": "process 7 is gone",
        "seed": 3,
        "episode": 12,
        "step": 40,
        "last": ["driver: starts", "end: closed: nothing"],
    }


def test_no_two_kinds_are_told_alike() -> None:
    assert len(Kind.__members__) == len({kind.value for kind in Kind})
