# SPDX-License-Identifier: GPL-2.0-only
"""A comparison that nobody measured."""

from __future__ import annotations

from hostzero.vm.compare import Comparison, Plan, Setting
from hostzero.vm.compare_phases import ArmName, Phase, Sample
from hostzero.vm.steps import MIB

HOST: dict[str, object] = {"cpu": "A processor", "cpus_usable": 2, "memory_bytes": 8 << 30, "kernel": "6.1"}


def sample(
    arm: ArmName,
    phase: Phase,
    repetition: int,
    *,
    main: float,
    backend: float = 0.0,
    wall: float = 2.0,
    waited: float = 0.0,
    back: int = 0,
    pool: int | None = None,
) -> Sample:
    """A sample whose vCPU used a second."""
    everything = main + backend + 1.0
    return Sample(
        arm, phase, repetition, wall, main, backend, 1.0, everything, waited, back * MIB, pool_freed=pool
    )


def comparison(*, huge_pages: bool = False) -> Comparison:
    """Two repetitions: hostzero uses half of QEMU's CPU time in the first and all of it in the second."""
    pool = 16 if huge_pages else None
    none = 0 if huge_pages else None
    setting = Setting("init_on_alloc=0", {ArmName.HOSTZERO: [1, 5], ArmName.QEMU: [1, 5]})
    for turn, ours in ((1, 0.75), (0, 0.25)):
        setting.samples += [
            sample(ArmName.QEMU, Phase.INFLATE, turn, main=1.0, wall=4.0, pool=none),
            sample(
                ArmName.HOSTZERO,
                Phase.INFLATE,
                turn,
                main=0.25,
                backend=ours,
                waited=turn,
                back=32,
                pool=pool,
            ),
        ]
    return Comparison(Plan(("init_on_alloc=0",), 2, huge_pages), "tcg", "11.1.3", "7.2", HOST, [setting])
