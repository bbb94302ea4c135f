# SPDX-License-Identifier: GPL-2.0-only
"""A device of hostzero in a process of its own, with a control socket: what the suite is tried on."""

from __future__ import annotations

import asyncio
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostzero.device import DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.vhost_user import Service
from hostzero.vhost_user.control import ControlServer
from hostzero.vhost_user.control_commands import SessionFacts
from hostzero.vhost_user.server import device_config


class ServiceWithFacts(Service):
    """A service that tells the control socket of its session."""

    def session_facts(self) -> SessionFacts:
        session = self.session
        if session is None:
            return SessionFacts("none")
        memory = 0 if session.table is None else session.table.size
        return SessionFacts(session.state.value, connected=True, memory_bytes=memory)


async def serve(listener: socket.socket, control: Path) -> None:
    config: DeviceConfig = device_config(IMPLEMENTED)
    service = ServiceWithFacts(config)
    with selectors.EpollSelector() as selector, ControlServer(service, selector) as server:
        server.listen(control)

        def turn() -> None:
            for key, mask in selector.select(0):
                key.data(mask)

        asyncio.get_running_loop().add_reader(selector.fileno(), turn)
        await service.serve(listener)


def main(vhost_user: str, control: str) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(vhost_user)
    listener.listen()
    print("ready", flush=True)
    asyncio.run(serve(listener, Path(control)))


@contextmanager
def running(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Run a backend; yield the paths of its vhost-user socket and of its control socket."""
    vhost_user, control = folder / "balloon.sock", folder / "control.sock"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.conform.backend", str(vhost_user), str(control)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield vhost_user, control
        assert process.poll() is None, "the backend went away"
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
