# SPDX-License-Identifier: GPL-2.0-only
"""Every scenario under every configuration that the series was tried with, and all mixtures of them."""

from __future__ import annotations

from itertools import product

import pytest

import tests.scenarios_mm  # noqa: F401  registers its scenarios
from hostzero.mm import MmConfig
from tests.scenarios import SCENARIOS, Scenario, believes, check, machine_of

OPTIONS = ("debug_vm", "init_on_alloc", "init_on_free", "page_poisoning")
CONFIGS = {
    "+".join(name for name, on in zip(OPTIONS, values, strict=True) if on) or "none": MmConfig(
        debug_vm=values[0], init_on_alloc=values[1], init_on_free=values[2], page_poisoning=values[3]
    )
    for values in product((False, True), repeat=4)
}


@pytest.mark.compiled_only
@pytest.mark.parametrize("run", SCENARIOS.values(), ids=SCENARIOS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scenario(config: MmConfig, run: Scenario) -> None:
    """What it does, and which claims it expects, is the scenario's own; see `tests/scenarios.py`."""
    with machine_of(config) as machine:
        check(machine)
        run(machine)
        check(machine)


@pytest.mark.compiled_only
def test_the_matrix_is_complete() -> None:
    """Sixteen configurations, and some of them believe their host while others cannot."""
    assert len(CONFIGS) == 16
    believing = []
    for name, config in CONFIGS.items():
        with machine_of(config) as machine:
            if believes(machine):
                believing.append(name)
    assert believing == ["none", "init_on_alloc", "debug_vm", "debug_vm+init_on_alloc"]
