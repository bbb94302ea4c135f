# SPDX-License-Identifier: GPL-2.0-only
"""A device with a busy guest and a control socket, as a process: ``python -m ... SOCKET``.

The guest follows the target by 16 pages a turn, answers questions for statistics, and sends one
malformed request each turn. The process ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from pathlib import Path

from hostzero.units import Gpa
from hostzero.vhost_user.control import ControlServer
from hostzero.virtio.features import QueueRole
from tests.device.guest import BITMAP_AT, PFNS_AT, Guest, WrappedMemory, ram_of
from tests.vhost_user.control_service import FakeService

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


async def serve(path: Path, guest: Guest) -> None:
    """Serve until standard input ends."""
    async with ControlServer(FakeService(guest.device)) as server:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        await server.listen(listener)
        ending = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin, ending.set)
        print("ready", flush=True)  # noqa: T201 - for the test that waits
        while not ending.is_set():
            _work(guest)
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    with ram_of() as ram:
        busy = Guest(WrappedMemory(ram))
        _offer_statistics(busy)
        asyncio.run(serve(Path(sys.argv[1]), busy))
