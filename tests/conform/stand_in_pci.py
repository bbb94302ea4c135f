# SPDX-License-Identifier: GPL-2.0-only
"""A PC's bus with one virtio-balloon-pci on it, made of our device core: what a driver of PCI is tried on."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

from hostzero.conform.qemu import SLOT
from hostzero.device import BalloonDevice
from hostzero.errors import DeviceError, VirtioError
from hostzero.ram import GuestMemory
from hostzero.units import Gpa
from hostzero.virtio.pci import NO_VECTOR, Common
from hostzero.virtio.ring_layout import RingLayout

ALL_ONES = 0xFFFF_FFFF
IO_BAR, MSIX_BAR, BAR = 0, 1, 4
SIZES = {MSIX_BAR: 0x1000, BAR: 0x4000}
COMMON, ISR, DEVICE, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
MULTIPLIER = 4
MSIX_CAP = 0x98
TABLE = 0x800


def configuration(vectors: int, ids: int) -> bytearray:
    """A configuration space as QEMU's, with an I/O BAR that has to be left alone."""
    config = bytearray(256)
    struct.pack_into("<I", config, 0, ids)
    config[0x34] = 0x40
    groups = ((1, COMMON), (2, NOTIFY), (3, ISR), (4, DEVICE))
    for n, (kind, offset) in enumerate(groups):
        at = 0x40 + 0x14 * n
        following = at + 0x14 if n < 3 else (MSIX_CAP if vectors else 0)
        length = 20 if kind == 2 else 16
        struct.pack_into("<BBBBBxxxII", config, at, 0x09, following, length, kind, BAR, offset, 0x1000)
        if kind == 2:
            struct.pack_into("<I", config, at + 16, MULTIPLIER)
    if vectors:
        struct.pack_into("<BBHII", config, MSIX_CAP, 0x11, 0, vectors - 1, TABLE | MSIX_BAR, MSIX_BAR)
    return config


class StandInPci:
    """The bus; `device` is behind its slot.

    Attributes:
        config: the configuration space.
        before_notify: is run before each doorbell; a test may make it do anything.
    """

    def __init__(
        self, memory: GuestMemory, device: BalloonDevice, vectors: int = 6, ids: int = 0x1045_1AF4
    ) -> None:
        self._memory = memory
        self._device = device
        self._device.on_config_change(self._config_changed)
        self._vectors = vectors
        self.config = configuration(vectors, ids)
        self._bars = {IO_BAR: 1, BAR: 0xC} | ({MSIX_BAR: 0} if vectors else {})
        self._port = 0
        self._table = bytearray(16 * max(vectors, 1))
        self._isr = 0
        self._generation = 0
        self.before_notify: Callable[[], None] = lambda: None
        self._reset()

    def _reset(self) -> None:
        self._selects = {Common.DEVICE_FEATURE_SELECT: 0, Common.DRIVER_FEATURE_SELECT: 0}
        self._driver_features = 0
        self._queue = 0
        self._queues: dict[int, dict[int, int]] = {}
        self._config_vector = NO_VECTOR

    # ------------------------------------------------------------------ I/O ports

    def outl(self, port: int, value: int) -> None:
        if port == 0xCF8:
            self._port = value
        elif port == 0xCFC and self._here:
            at = self._port & 0xFC
            if 0x10 <= at < 0x28:
                self._write_bar((at - 0x10) // 4, value)
            elif at == 0x04:
                struct.pack_into("<H", self.config, at, value & 0x7)
            elif at == MSIX_CAP:
                struct.pack_into("<H", self.config, at + 2, value >> 16 & 0xC000 | self._vectors - 1)

    def inl(self, port: int) -> int:
        assert port == 0xCFC
        if not self._here:
            return ALL_ONES
        at = self._port & 0xFC
        if 0x10 <= at < 0x28:
            return self._bars.get((at - 0x10) // 4, 0)
        return int.from_bytes(self.config[at : at + 4], "little")

    @property
    def _here(self) -> bool:
        return self._port & ~0xFC == 1 << 31 | SLOT << 11

    def _write_bar(self, number: int, value: int) -> None:
        if number == IO_BAR:
            self._bars[number] = value & ~0x1F & ALL_ONES | 1
        elif number in SIZES and number in self._bars:
            kind = 0xC if number == BAR else 0
            self._bars[number] = value & -SIZES[number] & ALL_ONES | kind
        elif number == BAR + 1:
            self._bars[number] = value

    # ------------------------------------------------------------------ memory

    def read(self, address: int, width: int) -> int:
        bar, offset = self._find(address)
        if bar == MSIX_BAR:
            return int.from_bytes(self._table[offset - TABLE :][:width], "little")
        if bar != BAR:
            return (1 << 8 * width) - 1
        if offset < ISR:
            return self._read_common(offset)
        if offset < DEVICE:
            isr, self._isr = self._isr, 0
            return isr
        try:
            return int.from_bytes(self._device.read_config(offset - DEVICE, width), "little")
        except DeviceError:
            return (1 << 8 * width) - 1

    def write(self, address: int, width: int, value: int) -> None:
        bar, offset = self._find(address)
        data = value.to_bytes(width, "little")
        if bar == MSIX_BAR:
            self._table[offset - TABLE : offset - TABLE + width] = data
        elif bar == BAR:
            # What a device refuses is lost on a bus that has no answer to a write.
            with contextlib.suppress(DeviceError, VirtioError):
                if offset < ISR:
                    self._write_common(offset, value)
                elif offset >= NOTIFY:
                    assert offset - NOTIFY == MULTIPLIER * value
                    self.before_notify()
                    self._device.notify(value)
                elif offset >= DEVICE:
                    self._device.write_config(offset - DEVICE, data)

    def _find(self, address: int) -> tuple[int, int]:
        if int.from_bytes(self.config[4:6], "little") & 2:
            for number, size in SIZES.items():
                start = self._bars.get(number, 0) & ~0xF
                if start and start <= address < start + size:
                    return number, address - start
        return -1, 0

    # ------------------------------------------------------------------ common configuration

    def _registers(self) -> dict[int, int]:
        size = self._device.queue_size_max(self._queue)
        return self._queues.setdefault(
            self._queue, {Common.QUEUE_SIZE: size, Common.QUEUE_MSIX_VECTOR: NO_VECTOR}
        )

    def _read_common(self, offset: int) -> int:
        if offset == Common.DEVICE_FEATURE:
            word = self._selects[Common.DEVICE_FEATURE_SELECT]
            return self._device.device_features() >> 32 * word & ALL_ONES
        if offset == Common.DEVICE_STATUS:
            return self._device.status()
        if offset == Common.CONFIG_GENERATION:
            return self._generation
        if offset == Common.CONFIG_MSIX_VECTOR:
            return self._config_vector
        if offset == Common.QUEUE_NOTIFY_OFF:
            return self._queue
        return self._registers().get(offset, 0)

    def _write_common(self, offset: int, value: int) -> None:
        if offset in self._selects:
            self._selects[Common(offset)] = value
        elif offset == Common.DRIVER_FEATURE:
            word = self._selects[Common.DRIVER_FEATURE_SELECT]
            self._driver_features &= ~(ALL_ONES << 32 * word)
            self._driver_features |= value << 32 * word
            self._device.set_driver_features(self._driver_features)
        elif offset == Common.DEVICE_STATUS:
            if value == 0:
                self._reset()
            self._device.set_status(value)
        elif offset == Common.CONFIG_MSIX_VECTOR:
            self._config_vector = value if value < self._vectors else NO_VECTOR
        elif offset == Common.QUEUE_SELECT:
            self._queue = value
        elif offset == Common.QUEUE_MSIX_VECTOR:
            self._registers()[offset] = value if value < self._vectors else NO_VECTOR
        elif offset == Common.QUEUE_ENABLE:
            self._enable()
        else:
            self._registers()[offset] = value

    def _enable(self) -> None:
        registers = self._registers()
        vector = registers[Common.QUEUE_MSIX_VECTOR]
        desc, avail, used = (
            registers.get(at, 0) | registers.get(at + 4, 0) << 32
            for at in (Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE)
        )
        layout = RingLayout.validated(self._memory, registers[Common.QUEUE_SIZE], desc, avail, used)

        def interrupt() -> None:
            self._isr |= 1
            self._message(vector)

        self._device.setup_queue(self._queue, layout, interrupt)

    # ------------------------------------------------------------------ notifications

    def _config_changed(self) -> None:
        self._generation = self._generation + 1 & 0xFF
        self._isr |= 2
        self._message(self._config_vector)

    def _message(self, vector: int) -> None:
        control = int.from_bytes(self.config[MSIX_CAP + 2 : MSIX_CAP + 4], "little")
        if vector < self._vectors and control & 0x8000:
            address, data, mask = struct.unpack_from("<QII", self._table, 16 * vector)
            if not mask & 1:
                self._memory.write(Gpa(address), data.to_bytes(4, "little"))
