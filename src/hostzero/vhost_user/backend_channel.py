# SPDX-License-Identifier: GPL-2.0-only
"""The channel from the backend to the front end (SET_BACKEND_REQ_FD), for CONFIG_CHANGE alone.

No reply is ever asked for: QEMU holds its big lock while it waits for our answer to GET_CONFIG,
and does not answer here meanwhile, so each side would wait for the other. And nothing here
blocks: a channel that is full holds notifications that nobody has read, and the front end reads
the whole configuration space after any of them.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

from hostzero.errors import ConnectionLost, MessageError
from hostzero.vhost_user.connection import Connection, Fd
from hostzero.vhost_user.protocol import BackendRequest, ErrorKind

if TYPE_CHECKING:
    from hostzero.vhost_user.metrics import ServiceMetrics


class BackendChannel:
    """A connected socket on which a front end hears of configuration changes."""

    def __init__(self, fd: Fd, metrics: ServiceMetrics) -> None:
        """Take over a socket.

        Raises:
            MessageError: the descriptor is no stream socket; it is closed.
        """
        with fd:
            if not stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode):
                raise MessageError(ErrorKind.DESCRIPTORS, "the backend channel is no socket")
            sock = socket.socket(fileno=fd.fileno())
            if sock.type != socket.SOCK_STREAM:
                sock.detach()  # an `Fd` closes without waiting
                raise MessageError(ErrorKind.DESCRIPTORS, "the backend channel is no stream socket")
            fd.detach()
        sock.setblocking(False)
        self._connection = Connection(sock)
        self._metrics = metrics

    def config_change(self) -> bool:
        """Say that the configuration space has changed; return whether that was sent."""
        try:
            self._connection.send(BackendRequest.CONFIG_CHANGE_MSG)
        except ConnectionLost:
            self._metrics.config_changes_dropped += 1
            return False
        self._metrics.config_changes_sent += 1
        return True

    def close(self) -> None:
        """Close the channel."""
        self._connection.close()
