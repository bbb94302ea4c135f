# SPDX-License-Identifier: GPL-2.0-only
"""The command line: one module per command, each thin over the room that does the work."""
