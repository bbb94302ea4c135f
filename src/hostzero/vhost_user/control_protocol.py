# SPDX-License-Identifier: GPL-2.0-only
"""What both ends of the control socket know: version, limits, and the kinds of errors.

A request is one JSON object on one line; the answer is another. docs/control.md has the
protocol for people. ::

    {"version": 1, "command": "resize", "arguments": {"balloon_bytes": 1073741824}}
    {"version": 1, "ok": true, "result": {"target_bytes": 1073741824, ...}}
    {"version": 1, "ok": false, "error": {"kind": "refused", "message": "..."}}
"""

from __future__ import annotations

import enum
from typing import Final

PROTOCOL_VERSION: Final = 1
"""Counts changes that an older client would misread. New keys in an answer are none."""

LINE_BYTES_MAX: Final = 4096
"""The longest request, its newline included; the longest that anybody needs has 100 bytes."""


class Refusal(enum.StrEnum):
    """What can be wrong with a request."""

    MALFORMED = "malformed"
    """It is no request: no JSON object, an unknown key, or too long."""
    VERSION = "version"
    """It is of another version of the protocol."""
    UNKNOWN_COMMAND = "unknown-command"
    """There is no such command."""
    INVALID_ARGUMENT = "invalid-argument"
    """The command does not take these arguments."""
    REFUSED = "refused"
    """The device cannot do it, or not now."""
    BUSY = "busy"
    """There are too many clients."""
    INTERNAL = "internal"
    """A defect; the log of the device has it."""
