# SPDX-License-Identifier: GPL-2.0-only
"""The balloon device behind a vhost-user socket, for virtual machines on a stock VMM.

`Service` is one device that serves one guest after another; `Session` is the state machine of
one connection; `messages`, `connection` and `memory_table` are the protocol, for either end.
docs/vhost-user.md has the whole on one page.
"""

from hostzero.vhost_user.metrics import ServiceMetrics
from hostzero.vhost_user.server import Service
from hostzero.vhost_user.session import Session, SessionState

__all__ = ["Service", "ServiceMetrics", "Session", "SessionState"]
