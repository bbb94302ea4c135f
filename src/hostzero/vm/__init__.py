# SPDX-License-Identifier: GPL-2.0-only
"""Real virtual machines: a stock QEMU and a stock Linux guest, with hostzero's device or QEMU's own."""
