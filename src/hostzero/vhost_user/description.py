# SPDX-License-Identifier: GPL-2.0-only
"""The description file by which management programs find backends on a machine.

Such files lie in ``/usr/share/qemu/vhost-user/`` or ``/etc/qemu/vhost-user/``
(`VhostUserBackend` in QEMU's `docs/interop/vhost-user.json`). This one is package data,
``share/50-hostzero.json``, with the path of the program left to fill in.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Final

DESCRIPTION_FILE: Final = "50-hostzero.json"


def description(binary: Path) -> dict[str, object]:
    """Return the description of this backend, whose program is at `binary`."""
    text = (files("hostzero.vhost_user") / "share" / DESCRIPTION_FILE).read_text()
    document: dict[str, object] = json.loads(text)
    return document | {"binary": str(binary)}
