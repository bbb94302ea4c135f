# SPDX-License-Identifier: GPL-2.0-only
"""A stand-in for QEMU and the guest in it: a script that speaks on the same sockets.

It answers the monitor, and for the guest it answers commands on the serial port with ``ANSWERS``,
a mapping of commands to what they write; a command that is not there fails. The balloon reaches
each target at once. Its memory is a memfd with the name of QEMU's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from hostzero.vm.prepared import Prepared
from hostzero.vm.qemu import Qemu

MIB = 1 << 20

_SCRIPT = """#!{python}
import json, os, re, socket, sys, threading, time

MODE, ANSWERS, MEMORY = {mode!r}, {answers!r}, {memory}
arguments = " ".join(sys.argv[1:])
if "--version" in arguments:
    print("QEMU emulator version {version} (Debian)")
    sys.exit()
if arguments == "-device help":
    print('name "{device}", bus PCI')
    sys.exit()
if MODE == "refuses":
    print("qemu: -device nonsense: not a device")
    sys.exit(1)
memory = os.memfd_create("memory-backend-memfd")
os.truncate(memory, MEMORY)
agent = socket.socket(socket.AF_UNIX)
agent.connect(re.search(r"id=agent,path=(\\S+)", arguments)[1])
qmp = socket.socket(socket.AF_UNIX)
qmp.connect(re.search(r"-qmp unix:(\\S+)", arguments)[1])
state = dict(actual=MEMORY)

def monitor():
    def say(thing):
        qmp.sendall(json.dumps(thing).encode() + b"\\n")
    say({{"QMP": {{"version": {{"qemu": {{"major": 9}}}}, "capabilities": []}}}})
    received, decoder = "", json.JSONDecoder()
    while data := qmp.recv(4096).decode():
        received += data
        try:
            request, end = decoder.raw_decode(received)
        except ValueError:
            continue  # not whole yet; no newline ends it
        received = received[end:].lstrip()
        name, given = request["execute"], request.get("arguments", {{}})
        if name == "balloon":
            state["actual"] = given["value"]
        known = {{"qmp_capabilities": {{}}, "balloon": {{}}, "query-balloon": state,
                 "query-status": {{"status": "paused" if MODE == "stuck" else "running"}},
                 "query-cpus-fast": [{{"thread-id": os.getpid()}}]}}
        answer = {{"return": known[name]}} if name in known else {{
            "error": {{"class": "CommandNotFound", "desc": "no " + name}}}}
        say(answer | {{"id": request.get("id")}})

threading.Thread(target=monitor, daemon=True).start()
if MODE in ("silent", "stuck"):
    time.sleep(60)
agent.sendall(b"@ready 0 0\\n")
for line in agent.makefile():
    number, _, command = line.rstrip("\\n").partition(" ")
    if command == "die":
        os.abort()
    status, said = (0, ANSWERS[command]) if command in ANSWERS else (127, "no " + command)
    agent.sendall(f"@{{number}} {{status}} {{len(said)}}\\n{{said}}".encode())
"""


def write_qemu(
    path: Path,
    *,
    mode: str = "",
    answers: Mapping[str, str] | None = None,
    memory: int = 64 * MIB,
    version: str = "99.1.0",
    device: str = "vhost-user-test-device-pci",
) -> Qemu:
    """Write the script; `mode` is "", "refuses", "silent" (no guest) or "stuck" (its CPU stopped)."""
    path.write_text(
        _SCRIPT.format(
            python=sys.executable,
            mode=mode,
            answers=json.loads(json.dumps(answers or {})),
            memory=memory,
            version=version,
            device=device,
        )
    )
    path.chmod(0o755)
    return Qemu((str(path),), {}, version)


def prepared_with(folder: Path, qemu: Qemu) -> Prepared:
    """Return a cache with this QEMU, whose kernel nobody boots."""
    return Prepared(folder, qemu, "7.2.0-test", {"qemu": "1"}, 4096)
