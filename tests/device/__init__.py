# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the wire: each module on its own, then both ends of a ring against each other."""
