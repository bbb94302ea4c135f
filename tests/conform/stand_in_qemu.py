# SPDX-License-Identifier: GPL-2.0-only
"""A program that behaves as QEMU does where `hostzero conform --qemu` looks: qtest, QMP, a balloon.

``-stand-in MODE`` makes it misbehave: `die` at the first notification, `hang` there, `refuse` to
start, be `mute` (never connect), be a `stranger`, or `bare` (without the device); or it has `old`
hardware (no MSI-X) or `other` hardware (a network card).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import selectors
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hostzero.conform.in_process import HIGH_AT, HIGH_BYTES, LOW_BYTES
from hostzero.conform.qemu import STATISTICS, UNSET
from hostzero.device import BalloonDevice, DeviceConfig
from hostzero.device.config import IMPLEMENTED
from hostzero.errors import HostzeroError
from hostzero.ram import GuestMemory, MemoryRegion
from hostzero.ram.region import Ram
from hostzero.units import PAGE_SIZE, Gpa
from tests.conform.stand_in_pci import StandInPci

VERSION = "QEMU emulator version 99.1.2 (stand-in)"
WIDTHS = {"b": 1, "w": 2, "l": 4}


def script(folder: Path, mode: str = "") -> Path:
    """Write a wrapper script that runs this module; it does not exec, as a careless wrapper."""
    path = folder / "qemu"
    root = Path(__file__).resolve().parents[2]
    version = VERSION if mode != "stranger" else "cat (GNU coreutils) 9.1"
    devices = 'name "virtio-balloon-pci", bus PCI' if mode != "bare" else 'name "e1000", bus PCI'
    path.write_text(f"""#!/bin/sh
case "$*" in
*--version) echo '{version}'; exit ;;
"-device help") echo '{devices}'; exit ;;
"-device virtio-balloon-pci,help") echo '  vectors=<uint32>       -  (default: 4294967295)'; exit ;;
esac
PYTHONPATH={root}:{root / "src"} {sys.executable} -m {__name__} {f"-stand-in {mode}" if mode else ""} "$@"
status=$?
exit $status
""")
    path.chmod(0o755)
    return path


class Machine:
    def __init__(self, memory: GuestMemory, mode: str) -> None:
        self.device = BalloonDevice(memory, DeviceConfig(IMPLEMENTED))
        ids = 0x1041_1AF4 if mode == "other" else 0x1045_1AF4
        self.bus = StandInPci(memory, self.device, vectors=0 if mode == "old" else 6, ids=ids)
        self.bus.before_notify = {"die": die, "hang": hang}.get(mode, lambda: None)
        self.interval = 0

    def qtest(self, line: str) -> str:
        command, *words = line.split()
        numbers = [int(word, 16) for word in words]
        if command == "outl":
            self.bus.outl(*numbers)
        elif command == "inl":
            return f"OK 0x{self.bus.inl(*numbers):08x}"
        elif match := re.fullmatch("read([bwl])", command):
            return f"OK 0x{self.bus.read(numbers[0], WIDTHS[match[1]]):016x}"
        elif match := re.fullmatch("write([bwl])", command):
            self.bus.write(numbers[0], WIDTHS[match[1]], numbers[1])
        else:
            return f"FAIL Unknown command '{command}'"
        return "OK"

    def qmp(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "balloon":
            self.device.set_target((LOW_BYTES + HIGH_BYTES - arguments["value"]) // PAGE_SIZE)
        elif command == "qom-set":
            if arguments["value"] and not self.interval:
                self.device.request_stats()
            self.interval = arguments["value"]
        elif command == "qom-get":
            figures = {name: self.device.stats.get(tag, UNSET) for name, tag in STATISTICS.items()}
            return {"stats": figures, "last-update": 0}
        elif command not in {"qmp_capabilities", "query-status"}:
            raise HostzeroError(f"The command {command} has not been found")
        return {}


def die() -> None:
    say("first words")
    say("qemu: virtio.c:1: handle: Assertion `sane' failed.")
    os.abort()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def hang() -> None:
    time.sleep(3600)


def serve(machine: Machine, qtest: socket.socket, qmp: socket.socket) -> None:
    received = {qtest: "", qmp: ""}
    with selectors.DefaultSelector() as selector:
        for sock in received:
            selector.register(sock, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                data = peer.recv(65536)
                if not data:
                    # QEMU goes on without its sockets.
                    selector.unregister(peer)
                received[peer] += data.decode()
                if peer is qtest:
                    *lines, received[peer] = received[peer].split("\n")
                    for line in lines:
                        peer.sendall(machine.qtest(line).encode() + b"\n")
                else:
                    received[peer] = answer(machine, peer, received[peer])


# Monitors talk JSON, and a client need not end it with a line.
def answer(machine: Machine, sock: socket.socket, text: str) -> str:
    while text.strip():
        try:
            request, end = json.JSONDecoder().raw_decode(text.lstrip())
        except json.JSONDecodeError:
            break
        text = text.lstrip()[end:]
        try:
            reply = {"return": machine.qmp(request["execute"], request.get("arguments", {}))}
        except HostzeroError as error:
            reply = {"error": {"class": "GenericError", "desc": str(error)}}
        reply |= {"id": request["id"]} if "id" in request else {}
        sock.sendall(json.dumps(reply).encode() + b"\r\n")
    return text


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path.removeprefix("unix:"))
    return sock


def main(words: list[str]) -> None:
    mode = words[words.index("-stand-in") + 1] if "-stand-in" in words else ""
    options = dict(itertools.pairwise(words))
    if mode == "refuse" or "-nonsense" in words:
        say("qemu: -nonsense: invalid option")
        sys.exit(1)
    if mode == "mute":
        hang()
    firmware = Path(options["-bios"]).read_bytes()
    assert len(firmware) % 0x10000 == 0
    path = next(re.search("mem-path=([^,]+)", word) for word in words if "mem-path=" in word)
    assert path is not None
    with Path(path[1]).open("r+b") as file:
        ram = Ram.from_fd(file.fileno(), 0, LOW_BYTES + HIGH_BYTES)
    memory = GuestMemory(
        [MemoryRegion(Gpa(0), ram, 0, LOW_BYTES), MemoryRegion(Gpa(HIGH_AT), ram, LOW_BYTES, HIGH_BYTES)]
    )
    machine = Machine(memory, mode)
    qtest, qmp = connect(options["-qtest"]), connect(options["-qmp"])
    greeting = {"QMP": {"version": {"qemu": {"major": 99, "minor": 1, "micro": 2}, "package": ""}}}
    greeting["QMP"]["capabilities"] = []  # type: ignore[assignment]
    qmp.sendall(json.dumps(greeting).encode() + b"\r\n")
    serve(machine, qtest, qmp)


if __name__ == "__main__":
    main(sys.argv[1:])
