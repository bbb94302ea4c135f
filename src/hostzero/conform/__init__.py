# SPDX-License-Identifier: GPL-2.0-only
"""The suite that judges a balloon device: as a careful and as a hostile driver would use it."""
