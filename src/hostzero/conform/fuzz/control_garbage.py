# SPDX-License-Identifier: GPL-2.0-only
"""Whoever may connect to the control socket, at their worst: garbage, and commands at any time."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

from hostzero.conform.fuzz import draw
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.conform.fuzz.peer import Log, connect
from hostzero.vhost_user.control_protocol import LINE_BYTES_MAX


def _bytes(rng: Random) -> bytes:
    return rng.randbytes(rng.randrange(200)).replace(b"\n", b"")


def _long(rng: Random) -> bytes:
    return b"[" * rng.choice((LINE_BYTES_MAX - 1, LINE_BYTES_MAX, LINE_BYTES_MAX * 20))


def _other(rng: Random) -> bytes:
    values = ("null", "[]", "1e999", '"x"', "{}", '{"version": 1}', "-" + "9" * 4000, '{"a":' * 600)
    return rng.choice(values).encode()


def _command(rng: Random) -> bytes:
    choices: list[dict[str, object]] = [
        {},
        {"balloon_bytes": draw.number(rng, 30) << 12},
        {"guest_bytes": draw.number(rng, 64)},
        {"action": rng.choice(("start", "stop", "done", "", 7))},
        {"\ud800": None},
    ]
    arguments = rng.choice(choices)
    command = rng.choice(("status", "metrics", "resize", "resize", "stats", "hint", "hint", "no", 5))
    version = 1 if rng.random() < 0.9 else draw.number(rng, 70)
    return json.dumps({"version": version, "command": command, "arguments": arguments}).encode()


LINES: Final[dict[str, tuple[int, Callable[[Random], bytes]]]] = {
    "control: bytes": (1, _bytes),
    "control: long line": (1, _long),
    "control: other JSON": (2, _other),
    "control: command": (8, _command),
}


def pester(rng: Random, path: Path, log: Log) -> None:
    """Be one client: some lines, whose answers are read or not, and a bad end.

    Raises:
        Found: it is not answered, or the answer is no JSON.
    """
    kinds = list(LINES)
    try:
        sock = connect(path)
    except OSError as error:
        raise Found(Kind.STATUS, f"the control socket: {error.strerror or error}") from error
    with sock:
        for _ in range(rng.randrange(1, 4)):
            (kind,) = rng.choices(kinds, [LINES[kind][0] for kind in kinds])
            line = LINES[kind][1](rng)
            log.note(kind, f"{line[:60]!r}")
            if not _exchange(sock, line, log):
                return
        if rng.random() < 0.3:
            with contextlib.suppress(OSError):  # whoever closes after an answer is no worse for it
                sock.send(b'{"version": 1, "command": "sta', socket.MSG_NOSIGNAL)


# Whether the connection goes on.
def _exchange(sock: socket.socket, line: bytes, log: Log) -> bool:
    try:
        sock.sendall(line + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = sock.recv(1 << 16)
            if not part:
                break
            answer += part
    except TimeoutError as error:
        raise Found(Kind.STATUS, f"no answer to {line[:60]!r}") from error
    except OSError:
        answer = b""  # it has closed before it had read everything
    if not answer:
        if len(line) < LINE_BYTES_MAX:
            raise Found(Kind.STATUS, f"the connection ends without an answer to {line[:60]!r}")
        return False
    try:
        document = json.loads(answer)
        log.answers["control: done" if document["ok"] else f"control: {document['error']['kind']}"] += 1
    except (ValueError, KeyError, TypeError) as error:
        raise Found(Kind.STATUS, f"{answer[:60]!r} is no answer") from error
    return len(line) < LINE_BYTES_MAX
