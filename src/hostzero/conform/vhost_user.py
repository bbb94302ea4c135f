# SPDX-License-Identifier: GPL-2.0-only
"""A vhost-user backend as a target: hostzero is the front end and owns guest memory.

A backend serves one front end at a time, so each case connects, and disconnects when it is
done. What a host's side does, such as asking for statistics, is not in the protocol: for a
device of hostzero its control socket does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hostzero.conform.control import Control
from hostzero.conform.in_process import HIGH_AT, HIGH_BYTES, LOW_BYTES
from hostzero.conform.target import Ability
from hostzero.errors import ConnectionLost, HostzeroError, TargetError, UsageError, VhostUserError
from hostzero.ram import GuestMemory, MemoryRegion, open_ram
from hostzero.units import Gpa
from hostzero.vhost_user.frontend import VhostUserTransport
from hostzero.vhost_user.protocol import ProtocolFeature, Request
from hostzero.virtio.balloon import StatTag
from hostzero.virtio.ring_layout import RingLayout

REPLY_SECONDS: Final = 5.0
"""How long a backend may take for a reply."""

LOOK_EVERY: Final = 0.005
"""Seconds between two looks at memory, in which a backend may write without a notification."""

HOST_ABILITIES: Final = (Ability.SET_TARGET, Ability.REQUEST_STATS, Ability.READ_STATS, Ability.HINT)


class VhostUserTarget:
    """Devices behind one socket, one after the other.

    Attributes:
        name: ``unix:`` and the path of the socket.
    """

    def __init__(self, socket_path: Path, control_path: Path | None = None, backing: str = "memfd") -> None:
        """Connect to `socket_path`, and for the host's side to `control_path` if there is one."""
        self.name = f"unix:{socket_path}"
        self._socket = socket_path
        self._control = control_path
        self._backing = backing
        self._protocol = ProtocolFeature(0)

    def describe(self) -> Mapping[str, str]:
        """Return what the backend said about itself when a case last connected."""
        protocol = [feature.name or "" for feature in self._protocol]
        return {
            "device": f"the vhost-user backend at {self._socket}",
            "protocol features": " ".join(protocol),
            "memory": self._backing,
        }

    def connect(self) -> VhostUserConnection:
        """Return a fresh device.

        Raises:
            UsageError: nobody listens at the socket, or what listens is no balloon backend.
        """
        connection = VhostUserConnection(self._socket, self._control, self._backing)
        self._protocol = connection.transport.session.protocol
        return connection


class VhostUserConnection:
    """One session with a backend, and the guest memory that is shared with it."""

    def __init__(self, socket_path: Path, control_path: Path | None, backing: str) -> None:
        with ExitStack() as stack:
            ram = stack.enter_context(open_ram(LOW_BYTES + HIGH_BYTES, backing))
            # Two regions of one file, as QEMU has them on a PC.
            self.memory = GuestMemory(
                [
                    MemoryRegion(Gpa(0), ram, 0, LOW_BYTES),
                    MemoryRegion(Gpa(HIGH_AT), ram, LOW_BYTES, HIGH_BYTES),
                ]
            )
            self.transport = stack.enter_context(_connect(socket_path, self.memory))
            self._control = None
            if control_path is not None:
                self._control = stack.enter_context(Control(control_path))
            self._exit = stack.pop_all()
        self._moved = False
        self.arena = range(LOW_BYTES // 2, LOW_BYTES)
        self.nowhere = Gpa(HIGH_AT // 2)
        self.missing = self._what_is_missing()

    def settle(self, until: Callable[[], bool], timeout: float) -> bool:
        """Take notifications and look at memory until `until()` holds or the time is over."""
        deadline = time.monotonic() + timeout
        while not (holds := until()) and time.monotonic() < deadline:
            self.transport.wait(LOOK_EVERY)
        return holds

    def alive(self) -> bool:
        """Return whether the backend answers GET_FEATURES."""
        try:
            self.transport.session.number(Request.GET_FEATURES)
        except (HostzeroError, OSError):
            return False
        return True

    def set_target(self, pages: int) -> None:
        """Ask for another balloon size over the control socket."""
        self._moved = pages != 0
        self._host.resize(pages)

    def request_stats(self) -> None:
        """Ask for statistics over the control socket."""
        self._host.request_stats()

    def stats(self) -> Mapping[StatTag, int]:
        """Return the latest statistics from the control socket."""
        return self._host.stats()

    def hint_start(self) -> None:
        """Start a run of free page hinting over the control socket."""
        self._host.hint("start")

    def hint_stop(self) -> None:
        """Stop it."""
        self._host.hint("stop")

    def hint_done(self) -> None:
        """End it."""
        self._host.hint("done")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A backend keeps its target when a front end leaves; the next case expects none.
        if self._moved and kind is None:
            self.set_target(0)
        self._exit.close()

    @property
    def _host(self) -> Control:
        assert self._control is not None, "the cases look at `missing` first"
        return self._control

    def _what_is_missing(self) -> dict[Ability, str]:
        missing = {}
        protocol = self.transport.session.protocol
        if self._control is None:
            missing = dict.fromkeys(HOST_ABILITIES, "a vhost-user socket has no host's side; see --control")
        if ProtocolFeature.REPLY_ACK not in protocol:
            missing[Ability.FEATURES_OK] = "the backend has no REPLY_ACK and cannot say no"
        if ProtocolFeature.BACKEND_REQ not in protocol:
            missing[Ability.CONFIG_CHANGES] = "the backend has no BACKEND_REQ and cannot notify"
        return missing


class _Transport(VhostUserTransport):
    """The front end, with a backend that goes away as a device under test that does."""

    def device_features(self) -> int:
        with _gone_is_a_finding():
            return super().device_features()

    def status(self) -> int:
        with _gone_is_a_finding():
            return super().status()

    def set_status(self, status: int) -> None:
        with _gone_is_a_finding():
            super().set_status(status)

    def read_config(self, offset: int, length: int) -> bytes:
        with _gone_is_a_finding():
            return super().read_config(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        with _gone_is_a_finding():
            super().write_config(offset, data)

    def setup_queue(self, index: int, layout: RingLayout, interrupt: Callable[[], None]) -> None:
        with _gone_is_a_finding():
            super().setup_queue(index, layout, interrupt)

    def wait(self, timeout: float) -> bool:
        with _gone_is_a_finding():
            return super().wait(timeout)


@contextmanager
def _gone_is_a_finding() -> Iterator[None]:
    try:
        yield
    except (VhostUserError, OSError) as error:
        raise TargetError(str(error)) from error


# A backend that has not noticed yet that the last case's front end has left sends this one away.
def _connect(path: Path, memory: GuestMemory) -> VhostUserTransport:
    deadline = time.monotonic() + REPLY_SECONDS
    while True:
        try:
            return _Transport.connect(str(path), memory, REPLY_SECONDS, time.monotonic)
        except ConnectionLost as error:
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"{path}: the backend ends the connection; does it serve another front end? ({error})"
                ) from error
            time.sleep(LOOK_EVERY)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise UsageError(f"{path}: no backend listens there: {error.strerror}") from error
        except TimeoutError as error:
            raise UsageError(
                f"{path}: the backend does not answer; does it serve another front end?"
            ) from error
        except (VhostUserError, OSError) as error:
            raise UsageError(f"{path}: {error}") from error
