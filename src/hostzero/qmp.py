# SPDX-License-Identifier: GPL-2.0-only
"""QEMU's monitor for programs that are not asynchronous: `close` ends its socket and its event loop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from qemu.qmp.error import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol


class Monitor(QEMUMonitorProtocol):
    """The end of QMP that listens at a path until QEMU connects.

    The library runs on the thread's event loop and, where there is none, makes one that nobody
    closes: it is found as garbage much later, in somebody else's code. This one brings its own.
    """

    def __init__(self, path: Path) -> None:
        """Listen at `path`.

        Raises:
            qemu.qmp.protocol.ConnectError: there is no socket to be had there.
        """
        self._own_loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._own_loop)
        try:
            super().__init__(str(path), server=True)
        except BaseException:
            self._own_loop.close()
            raise
        finally:
            asyncio.set_event_loop(None)

    def close(self) -> None:
        """End the connection and the loop; QEMU may have closed its end first. Once more does nothing."""
        if self._own_loop.is_closed():
            return
        with contextlib.suppress(OSError, EOFError, QMPError):
            super().close()
        self._own_loop.close()
