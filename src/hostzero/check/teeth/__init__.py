# SPDX-License-Identifier: GPL-2.0-only
"""Mutants of the source, searched one by one: what the search would find if it were there."""
