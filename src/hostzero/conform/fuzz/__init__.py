# SPDX-License-Identifier: GPL-2.0-only
"""Malformed messages and rings against a real backend, watched from outside; `run.fuzz` begins it."""
