# SPDX-License-Identifier: GPL-2.0-only
"""hostzero: guest pages that the host has zeroed are not zeroed again."""
