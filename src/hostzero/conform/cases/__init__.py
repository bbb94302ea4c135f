# SPDX-License-Identifier: GPL-2.0-only
"""The cases, one module a subject; importing this package registers all of them."""

from hostzero.conform.cases import (
    bit6,
    bit7,
    chains,
    config_space,
    deflate,
    hinting,
    inflate,
    negotiation,
    notifications,
    numbering,
    poison,
    reporting,
    statistics,
)

MODULES = (
    negotiation,
    numbering,
    inflate,
    deflate,
    statistics,
    hinting,
    reporting,
    poison,
    bit6,
    bit7,
    config_space,
    chains,
    notifications,
)
"""The subjects, in the order in which they are run."""
