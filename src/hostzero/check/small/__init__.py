# SPDX-License-Identifier: GPL-2.0-only
"""Small guests: their elementary steps, the oracle that checks each, and two searches that do them."""
