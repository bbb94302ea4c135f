# SPDX-License-Identifier: GPL-2.0-only
"""What of a scene is state: its normal form, in which equal states have equal words.

A scene is brought into it after each step. What lies behind the ends of its tables is cleared, the
present shape is moved to where the past one was, and owners' blocks are sorted by address. The
last is the one symmetry that is used: an owner's number means nothing to a step but which block it
is about, so two scenes that differ in the numbers alone have the same future, number for number.
Steps that were recorded in normal form are replayed in normal form.

The CPUs are not interchangeable (lists are drained in their order), nor are addresses.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from hostzero.check.small.layout import (
    BATCH_STAGE,
    BATCH_START,
    BROKEN,
    IN_FLIGHT,
    LEAVING,
    NOW,
    NR_OWNED,
    SETUP,
    Scene,
)
from hostzero.check.small.step_codes import S_BALLOON, S_CAPACITY, S_OWNERS
from hostzero.jit import compiled
from hostzero.mm.mmzone import Memory

_CTL: Final = (NR_OWNED, BATCH_START, BATCH_STAGE, IN_FLIGHT, LEAVING, BROKEN)
"""The single values that are state. What else is in `ctl` is fixed, counts, or is of one step."""


@compiled
def normal_form(mem: Memory, scene: Scene) -> None:
    """Bring a scene into its normal form, after a step."""
    ctl = scene.ctl
    nr_pages = mem.vm[0].nr_pages
    if ctl[NOW] != 0:
        ctl[NOW] = 0
        for pfn in range(nr_pages):
            scene.shape[pfn] = scene.shape[nr_pages + pfn]
    for i in range(ctl[NR_OWNED], ctl[SETUP + S_OWNERS]):
        scene.own_pfn[i] = 0
        scene.own_order[i] = 0
    for i in range(1, ctl[NR_OWNED]):
        pfn = scene.own_pfn[i]
        order = scene.own_order[i]
        at = i
        while at > 0 and scene.own_pfn[at - 1] > pfn:
            scene.own_pfn[at] = scene.own_pfn[at - 1]
            scene.own_order[at] = scene.own_order[at - 1]
            at -= 1
        scene.own_pfn[at] = pfn
        scene.own_order[at] = order
    capacity = ctl[SETUP + S_CAPACITY]
    start = ctl[BATCH_START]
    for i in range(start):
        scene.sg_pfn[i] = 0
        scene.sg_order[i] = 0
        scene.answered[i] = 0
    for entry in range(capacity):
        # The device numbers the entries of a call from its first one.
        if entry >= capacity - start or scene.answered[start + entry] == 0:
            scene.zeroed[entry] = 0
    for i in range(ctl[SETUP + S_BALLOON]):
        if i >= ctl[IN_FLIGHT]:
            scene.flight[i] = 0
            scene.flight_zeroed[i] = 0
        if i >= ctl[LEAVING]:
            scene.leaving[i] = 0
            scene.leaving_zeroed[i] = 0


def state_words(mem: Memory, scene: Scene) -> dict[str, Any]:
    """Return, by array of the scene, which of its words are state in normal form."""
    ctl = scene.ctl
    owners, capacity, balloon = (int(ctl[SETUP + at]) for at in (S_OWNERS, S_CAPACITY, S_BALLOON))
    nr_pages = int(mem.vm[0].nr_pages)
    known = {
        "ctl": np.array(_CTL),
        "shape": np.arange(nr_pages),
        "held": np.arange(nr_pages),
        "own_pfn": np.arange(owners),
        "own_order": np.arange(owners),
        "sg_pfn": np.arange(capacity),
        "sg_order": np.arange(capacity),
        "answered": np.arange(capacity),
        "zeroed": np.arange(capacity),
        "flight": np.arange(balloon),
        "flight_zeroed": np.arange(balloon),
        "leaving": np.arange(balloon),
        "leaving_zeroed": np.arange(balloon),
    }
    return {name: known.get(name, np.arange(0)) for name in scene._fields}
