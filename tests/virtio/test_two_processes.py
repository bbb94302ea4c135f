# SPDX-License-Identifier: GPL-2.0-only
"""The driver here, the device in another process, and between them only shared bytes.

Neither end polls: the device sleeps on its eventfd once its ring is empty, and so does the
driver until something is used. A notification that is lost by the order of an index and an
event therefore stops the test, which is what the limit of the wait is for.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from hostzero.ram import GuestMemory, open_ram
from hostzero.units import Gpa
from hostzero.virtio import DriverQueue, RingLayout, Segment
from tests.virtio.echo_device import STOP
from tests.virtio.memory import BUFFERS, RING

SIZE = 8
START = 65000
REQUESTS = 3000
STUCK_AFTER = 60
"""Seconds without a word from the other process: only ever reached by a lost notification."""


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_request_and_no_notification_is_lost(event_idx: bool) -> None:
    with open_ram(2 << 20, "memfd") as ram:
        memory = GuestMemory.whole(ram)
        layout = RingLayout.contiguous(memory, SIZE, RING)
        kick, call = os.eventfd(0), os.eventfd(0)
        driver = DriverQueue(
            memory,
            layout,
            event_idx=event_idx,
            notify=lambda: os.eventfd_write(kick, 1),
            start_index=START,
        )
        fd = ram.fileno
        assert fd is not None
        words = map(str, (fd, ram.size, SIZE, int(event_idx), START, kick, call))
        device = subprocess.Popen(
            [sys.executable, "-m", "tests.virtio.echo_device", *words],
            pass_fds=(fd, kick, call),
            cwd=Path(__file__).parents[2],
        )
        try:
            exchange(memory, driver, call)
        finally:
            os.eventfd_write(kick, STOP)
            status = device.wait()
            os.close(kick)
            os.close(call)
        assert status == 0


def exchange(memory: GuestMemory, driver: DriverQueue, call: int) -> None:
    """Keep the ring full until every request came back with its own bytes, once."""
    places = list(range(SIZE // 2))
    sent, back = 0, set[int]()
    while len(back) < REQUESTS:
        while places and sent < REQUESTS:
            place = places.pop()
            out, in_ = Gpa(BUFFERS + 128 * place), Gpa(BUFFERS + 128 * place + 64)
            data = sent.to_bytes(4, "little") * (1 + sent % 16)
            memory.write(out, data)
            driver.add([Segment(out, len(data))], [Segment(in_, 64)], (sent, place, data))
            sent += 1
            # One at a time, so that the device falls asleep and wakes as often as can be.
            driver.kick()
        collected = driver.collect()
        for token, length in collected:
            assert isinstance(token, tuple)
            number, place, data = token
            assert number not in back
            assert length == len(data)
            assert memory.read(Gpa(BUFFERS + 128 * place + 64), length) == data
            back.add(number)
            places.append(place)
        if not collected:
            ready, _, _ = select.select([call], [], [], STUCK_AFTER)
            assert ready, f"a notification was lost: {sent} sent, {len(back)} back"
            os.eventfd_read(call)
    assert driver.in_flight == 0
