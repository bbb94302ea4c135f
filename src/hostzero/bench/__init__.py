# SPDX-License-Identifier: GPL-2.0-only
"""Measure what known-zero pages save, and name what each number leaves out.

The modules by what they hold: `names` (scenarios, arms, phases), `options` (what a
run was asked for), `counters` (one measured stretch), `disturbance` (the rule for a
repetition that something else disturbed), `stats`, `results` (records and the JSON
document), `host` (the machine), `table` and `plot` (the two ways to look at results)
and `progress`. `run` hands each scenario to what runs its kind: `timed` (every arm through every
phase), `fragmented` (over the guests that `fragment` makes) and `memcg_limit`, which count; `render`,
`table_counts` and `plot_counts` show what they found.
"""
