# SPDX-License-Identifier: GPL-2.0-only
"""Measure what known-zero pages save, and name what each number leaves out.

The modules by what they hold: `names` (scenarios, arms, phases), `options` (what a
run was asked for), `counters` (one measured stretch), `disturbance` (the rule for a
repetition that something else disturbed), `stats`, `results` (records and the JSON
document), `host` (the machine), `table` and `plot` (the two ways to look at results)
and `progress`. `run` drives a machine through the scenarios.
"""
