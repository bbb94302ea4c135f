# SPDX-License-Identifier: GPL-2.0-only
"""Devices that are wrong in one thing each. A case that none of them fails would be no case."""
