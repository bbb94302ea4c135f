# SPDX-License-Identifier: GPL-2.0-only
"""What the vhost-user side counts; like the device's counters these only grow.

============================  ====================================================================
counter                       counts
============================  ====================================================================
``sessions``                  front ends that were served, the present one included
``refused_connections``       front ends that were sent away while another one was served
``messages``                  messages that were received, refused ones included
``errors``                    messages and connections that were refused, by kind (`ErrorKind`)
``kicks``                     notifications that were received, each for any number of buffers
``empty_kicks``               those of them that found nothing to do
``calls``                     notifications that were sent to a driver
``config_changes_sent``       CONFIG_CHANGE messages on the backend channel
``config_changes_dropped``    those that were not sent, because the channel is full or is not there
============================  ====================================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from hostzero.vhost_user.protocol import ErrorKind


@dataclass
class ServiceMetrics:
    """The counters of the table in the module's docstring."""

    sessions: int = 0
    refused_connections: int = 0
    messages: int = 0
    errors: dict[ErrorKind, int] = field(default_factory=lambda: dict.fromkeys(ErrorKind, 0))
    kicks: int = 0
    empty_kicks: int = 0
    calls: int = 0
    config_changes_sent: int = 0
    config_changes_dropped: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return all counters as plain integers, the errors by the names of their kinds."""
        return asdict(self) | {"errors": {str(kind): count for kind, count in self.errors.items()}}
