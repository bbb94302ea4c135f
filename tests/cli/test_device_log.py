# SPDX-License-Identifier: GPL-2.0-only
"""Mirror of ``hostzero.cli.device_log``: names on lines, and not too many of them."""

from __future__ import annotations

import io
import logging

import pytest

from hostzero.cli.device_log import BURST, LINES_PER_SECOND, DeviceLog


class Written:
    """A logger whose lines and clock are at hand."""

    def __init__(self) -> None:
        self.guest = "no guest"
        self.now = 100.0
        self._stream = io.StringIO()
        self.log = logging.getLogger("tests.device_log")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [DeviceLog(lambda: self.guest, self._stream, lambda: self.now)]

    def lines(self) -> list[str]:
        """Return what was written so far, and begin anew."""
        lines = self._stream.getvalue().splitlines()
        self._stream.seek(0)
        self._stream.truncate()
        return lines


@pytest.fixture
def written() -> Written:
    return Written()


def test_a_line_names_the_guest_that_is_served_then(written: Written) -> None:
    written.log.warning("%d kicks", 3)
    written.guest = "guest of qemu 7"
    written.log.info("one more")
    assert written.lines() == [
        "hostzero device: WARNING: no guest: 3 kicks",
        "hostzero device: INFO: guest of qemu 7: one more",
    ]


def test_a_flood_is_cut_and_counted(written: Written) -> None:
    for _ in range(BURST + 7):
        written.log.warning("malformed")
    assert len(written.lines()) == BURST
    written.now += 1.5 / LINES_PER_SECOND
    written.log.warning("%s again", "malformed")
    written.log.warning("malformed")
    assert written.lines() == [
        "hostzero device: WARNING: no guest: (7 lines were left out before this one) malformed again"
    ]
    written.now += 1e6
    for _ in range(2 * BURST):
        written.log.warning("malformed")
    # The clock's rest is not saved up beyond a burst.
    assert len(written.lines()) == BURST


def test_what_goes_as_it_should_hides_no_warning(written: Written) -> None:
    for _ in range(BURST + 3):
        written.log.info("queue runs")
    assert len(written.lines()) == BURST
    written.log.warning("malformed")
    assert written.lines() == [
        "hostzero device: WARNING: no guest: (3 lines were left out before this one) malformed"
    ]
    for _ in range(BURST + 3):
        written.log.warning("malformed")
    assert len(written.lines()) == BURST - 1


def test_an_error_is_never_left_out(written: Written) -> None:
    for _ in range(BURST + 1):
        written.log.warning("malformed")
    written.lines()
    written.log.error("no memory")
    (line,) = written.lines()
    assert line.startswith("hostzero device: ERROR: ")
    assert line.endswith("(1 lines were left out before this one) no memory")
