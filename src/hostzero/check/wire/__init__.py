# SPDX-License-Identifier: GPL-2.0-only
"""Hostile bytes from either end of the rings, judged by a second reading of the specification."""
