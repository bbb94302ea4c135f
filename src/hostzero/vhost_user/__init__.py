# SPDX-License-Identifier: GPL-2.0-only
"""The balloon device behind a vhost-user socket, for virtual machines on a stock VMM.

`Service` is one device that serves one guest after another; `Session` is the state machine of
one connection; `protocol`, `payloads`, `messages`, `connection` and `memory_table` are the protocol,
for either end, and `frontend` is the other end. docs/vhost-user.md has the whole on one page. The
public names are imported when they are first asked for, so that a client of the control socket need
not load a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics
    from hostzero.vhost_user.server import Service
    from hostzero.vhost_user.session import Session, SessionState

__all__ = ["Service", "ServiceMetrics", "Session", "SessionState"]

_MODULES = {"Service": "server", "ServiceMetrics": "metrics", "Session": "session", "SessionState": "session"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"hostzero.vhost_user.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
