# SPDX-License-Identifier: GPL-2.0-only
"""The transport over PCI, on a stand-in that is our own device behind registers; the suite runs on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from hostzero.conform.case import Case
from hostzero.conform.in_process import InProcessConnection, MakeDevice, everything
from hostzero.conform.pci_device import PciDevice
from hostzero.conform.qemu import MESSAGES, SLOT
from hostzero.conform.result import Outcome
from hostzero.conform.run import run_case
from hostzero.conform.suite import all_cases, select
from hostzero.conform.target import Ability, Connection
from hostzero.conform.virtio_pci import VirtioPciTransport
from hostzero.device import BalloonDevice
from hostzero.errors import DeviceError, VirtioError
from hostzero.virtio.balloon import VIRTIO_ID_BALLOON, StatTag
from hostzero.virtio.pci import Common
from hostzero.virtio.ring_layout import RingLayout
from hostzero.virtio.transport import Status, Transport
from tests.conform.catches import CATCHES
from tests.conform.stand_in_pci import COMMON, StandInPci
from tests.conform.wrong.device import WrongDevice

CASES = all_cases()
NOT_HERE = {"inflate-huge-host-page"}
"""Needs host pages of 2 MiB."""


class PciConnection(InProcessConnection):
    """Our device in this process, with registers in between."""

    transport: VirtioPciTransport  # type: ignore[assignment]

    def __init__(self, vectors: int = 6, make: MakeDevice = everything) -> None:
        super().__init__(make, "memfd")
        self.core: BalloonDevice = self.transport  # type: ignore[assignment]
        self.bus = StandInPci(self.memory, self.core, vectors)
        self.transport = VirtioPciTransport(
            PciDevice(self.bus, SLOT), VIRTIO_ID_BALLOON, self.memory, MESSAGES, 5
        )
        self._exit.callback(self.transport.close)

    def settle(self, until: object, timeout: float) -> bool:
        if isinstance(self.core, WrongDevice):
            self.core.poll()
        self.transport.poll()
        return super().settle(until, timeout)  # type: ignore[arg-type]

    def set_target(self, pages: int) -> None:
        self.core.set_target(pages)

    def request_stats(self) -> None:
        self.core.request_stats()

    def stats(self) -> Mapping[StatTag, int]:
        return self.core.stats

    def hint_start(self) -> None:
        self.core.hint_start()

    def hint_stop(self) -> None:
        self.core.hint_stop()

    def hint_done(self) -> None:
        self.core.hint_done()

    def __exit__(self, *_: object) -> None:
        self.core.reset()
        self._exit.close()


class PciTarget:
    name = "stand-in"

    def __init__(self, vectors: int = 6, make: MakeDevice = everything) -> None:
        self.vectors = vectors
        self.make = make

    def describe(self) -> Mapping[str, str]:
        return {}

    def connect(self) -> Connection:
        return PciConnection(self.vectors, self.make)


@pytest.fixture
def connection() -> Iterator[PciConnection]:
    with PciConnection() as connection:
        yield connection


def start(connection: PciConnection, status: int = 15) -> VirtioPciTransport:
    transport = connection.transport
    transport.set_status(3)
    transport.set_driver_features(1 << 32)
    for bits in (11, status):
        transport.set_status(bits)
    return transport


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_our_device_passes_behind_registers(case: Case) -> None:
    result = run_case(PciTarget(), case)
    expected = Outcome.NOT_APPLICABLE if case.id in NOT_HERE else Outcome.PASS
    assert result.outcome is expected, [*result.misses, *result.transcript]


@pytest.mark.parametrize(
    "case", select(["config-", "inflate-one", "stats-request"]), ids=lambda case: case.id
)
def test_our_device_passes_without_msix(case: Case) -> None:
    assert run_case(PciTarget(vectors=0), case).outcome is Outcome.PASS


@pytest.mark.parametrize(
    "case_id",
    [
        "negotiate-refuses-unoffered",
        "number-dense",
        "inflate-only-the-named",
        "report-gives-memory-back",
        "bit6-content",
        "bit7-bit-order",
        "config-target",
        "config-change-notified",
        "notify-used",
        "notify-suppressed",
        "chain-loop-of-one-inflate",
    ],
)
def test_a_wrong_device_is_caught_behind_registers(case_id: str) -> None:
    (case,) = select([case_id])
    result = run_case(PciTarget(make=CATCHES[case_id]), case)
    assert result.outcome in {Outcome.FAIL, Outcome.SHOULD}, result


def test_it_is_a_transport(connection: PciConnection) -> None:
    assert isinstance(connection.transport, Transport)
    assert connection.transport.interrupts.name == "MSI-X"
    assert Ability.INTERRUPTS not in connection.missing


def test_features_are_64_bits_wide(connection: PciConnection) -> None:
    transport = connection.transport
    assert transport.device_features() == connection.core.device_features()
    transport.set_status(3)
    transport.set_driver_features(1 << 32 | 2)
    transport.set_status(11)
    assert transport.status() == 11
    assert connection.core._state.acked == 1 << 32 | 2


def test_parts_of_the_configuration_go_in_accesses_of_their_size(connection: PciConnection) -> None:
    connection.core.set_target(0x0201)
    assert connection.transport.read_config(0, 8) == b"\1\2\0\0\0\0\0\0"
    assert connection.transport.read_config(1, 6) == b"\2\0\0\0\0\0"
    connection.transport.write_config(5, b"\x55")
    assert connection.transport.read_config(4, 4) == b"\0\x55\0\0"


def test_a_read_is_of_one_state_of_the_configuration(
    connection: PciConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(connection)
    read = connection.core.read_config

    def changes_once(offset: int, length: int) -> bytes:
        if offset == 4:
            monkeypatch.setattr(connection.core, "read_config", read)
            connection.core.set_target(9)
        return read(offset, length)

    monkeypatch.setattr(connection.core, "read_config", changes_once)
    assert connection.transport.read_config(0, 8) == b"\x09\0\0\0\0\0\0\0"


def test_a_change_is_told_from_poll_and_after_a_reset_too(connection: PciConnection) -> None:
    told: list[int] = []
    connection.transport.on_config_change(lambda: told.append(1))
    for turn in (1, 2):
        start(connection)
        connection.core.set_target(turn)
        assert len(told) == turn - 1
        connection.transport.poll()
        assert len(told) == turn
        connection.transport.set_status(0)


def test_a_queue_that_gets_no_vector_is_an_error(
    connection: PciConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = start(connection, 11)
    layout = RingLayout.contiguous(connection.memory, 8, connection.memory.regions[0].gpa)
    monkeypatch.setattr(connection.bus, "_vectors", 1)
    with pytest.raises(DeviceError, match="no MSI-X vector 1"):
        transport.setup_queue(0, layout, lambda: None)


def test_another_kind_of_device_is_an_error(connection: PciConnection) -> None:
    device = PciDevice(connection.bus, SLOT)
    with pytest.raises(VirtioError, match="1af4:1045, not 1af4:1041"):
        VirtioPciTransport(device, 1, connection.memory, MESSAGES, 5)


def test_a_device_without_all_registers_is_an_error(connection: PciConnection) -> None:
    connection.bus.config[0x40 + 3] = 9  # the common configuration becomes something unknown
    device = PciDevice(connection.bus, SLOT)
    with pytest.raises(VirtioError, match="no capability for its common registers"):
        VirtioPciTransport(device, VIRTIO_ID_BALLOON, connection.memory, MESSAGES, 5)


def test_the_status_is_one_byte_where_the_capability_says(connection: PciConnection) -> None:
    connection.transport.set_status(int(Status.ACKNOWLEDGE))
    assert connection.bus._read_common(COMMON + Common.DEVICE_STATUS) == 1
