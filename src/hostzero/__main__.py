# SPDX-License-Identifier: GPL-2.0-only
"""``python -m hostzero`` is ``hostzero``."""

from hostzero.cli.main import main

main()
