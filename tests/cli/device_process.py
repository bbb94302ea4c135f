# SPDX-License-Identifier: GPL-2.0-only
"""A device with a busy guest and a control socket, as a process: ``python -m ... SOCKET``.

The guest follows the target by 16 pages a turn, answers questions for statistics, and sends one
malformed request each turn. The process ends when its standard input does.
"""

from __future__ import annotations

import selectors
import struct
import sys
from pathlib import Path

from hostzero.units import Gpa
from hostzero.virtio.features import QueueRole
from tests.device.guest import BITMAP_AT, PFNS_AT, Guest, WrappedMemory, ram_of
from tests.vhost_user.control_service import FakeService, Loop

STEP = 16


def _offer_statistics(guest: Guest) -> None:
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQHQ", 4, 77 << 20, 10, 3))
    guest.put(QueueRole.STATS, [(BITMAP_AT, 20)])
    guest.kick(QueueRole.STATS)


def _work(guest: Guest) -> None:
    device = guest.device
    way = device.target - device.actual
    if way:
        pages = min(abs(way), STEP)
        guest.inflate(list(range(pages)))
        device.write_config(4, struct.pack("<I", device.actual + (pages if way > 0 else -pages)))
    guest.send(QueueRole.INFLATE, [(PFNS_AT, 3)])
    if guest.rings[QueueRole.STATS].returned():
        _offer_statistics(guest)


def main(path: Path) -> None:
    """Serve until standard input ends."""
    with ram_of() as ram:
        guest = Guest(WrappedMemory(ram))
        _offer_statistics(guest)
        loop = Loop(FakeService(guest.device))
        loop.server.listen(path)
        ending: list[int] = []
        loop.selector.register(sys.stdin, selectors.EVENT_READ, ending.append)
        print("ready", flush=True)  # noqa: T201 - for the test that waits
        while not ending:
            for key, mask in loop.selector.select(0.005):
                key.data(mask)
            _work(guest)
        loop.selector.unregister(sys.stdin)
        loop.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
