# SPDX-License-Identifier: GPL-2.0-only
"""The commands of the control socket: a line of JSON in, a line of JSON out, no socket.

Whatever the line holds, there is an answer, and a line that is answered by an error has changed
nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NoReturn, Protocol

from hostzero.device import BalloonDevice
from hostzero.errors import DeviceError
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, format_size
from hostzero.vhost_user.control_protocol import PROTOCOL_VERSION, Refusal
from hostzero.virtio.features import names

_log = logging.getLogger(__name__)

Document = dict[str, object]


@dataclass(frozen=True)
class QueueFacts:
    """One queue of a session.

    Attributes:
        index: its number, counted over the accepted features.
        role: what it carries (`QueueRole`).
        size: the entries of its ring.
        state: in a word whether it runs, as in ``enabled``.
    """

    index: int
    role: str
    size: int
    state: str


@dataclass(frozen=True)
class SessionFacts:
    """What a backend knows about the virtual machine that it serves.

    Attributes:
        state: the state of the session, as the backend calls it.
        connected: whether a front end is connected.
        peer_pid: the front end's process; None if there is none or it cannot be seen.
        memory_bytes: the guest memory in the memory table; 0 before there is one.
        protocol_features: what was negotiated between front end and backend.
        queues: the queues that are set up.
    """

    state: str
    connected: bool = False
    peer_pid: int | None = None
    memory_bytes: int = 0
    protocol_features: tuple[str, ...] = ()
    queues: tuple[QueueFacts, ...] = ()


class Counters(Protocol):
    """Counters that only grow."""

    def as_dict(self) -> dict[str, object]:
        """Return them as plain integers in nested mappings with text keys."""
        ...


class Service(Protocol):
    """A running backend, as far as the control socket needs it."""

    @property
    def device(self) -> BalloonDevice:
        """The device core."""
        ...

    @property
    def metrics(self) -> Counters:
        """The counters of the vhost-user side."""
        ...

    def session_facts(self) -> SessionFacts:
        """Return what is known about the session at this moment."""
        ...


@dataclass
class ControlMetrics:
    """What the control socket counts.

    Attributes:
        clients: connections that were accepted.
        refused_clients: connections that were sent away because there were too many.
        requests: requests that were answered, by an error or not.
        errors: answers that were errors, by kind.
    """

    clients: int = 0
    refused_clients: int = 0
    requests: int = 0
    errors: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))

    def as_dict(self) -> dict[str, object]:
        """Return all counters as plain integers, the errors by the names of their kinds."""
        return asdict(self) | {"errors": {str(kind): count for kind, count in self.errors.items()}}


class Commands:
    """Answers requests about one service.

    Attributes:
        metrics: its counters; the socket counts its clients there.
    """

    def __init__(self, service: Service) -> None:
        """Answer for `service`."""
        self.metrics = ControlMetrics()
        self._service = service
        self._commands: dict[str, Callable[[Mapping[str, object]], Document]] = {
            "status": self._status,
            "metrics": self._metrics,
            "resize": self._resize,
            "stats": self._stats,
            "hint": self._hint,
        }

    def answer(self, line: bytes) -> bytes:
        """Return the answer to one request line, with its newline; this does not raise."""
        self.metrics.requests += 1
        try:
            return _encode({"ok": True, "result": self._run(line)})
        except _RequestError as error:
            return self.error(error.kind, str(error))
        except DeviceError as error:
            return self.error(Refusal.REFUSED, str(error))
        except Exception:  # noqa: BLE001 - a defect in one answer is not worth a guest's balloon
            _log.exception("a control request failed")
            return self.error(Refusal.INTERNAL, "the request failed; the log of the device says why")

    def error(self, kind: Refusal, message: str) -> bytes:
        """Return an error answer, counted, with its newline."""
        self.metrics.errors[kind] += 1
        return _encode({"ok": False, "error": {"kind": str(kind), "message": message}})

    def _run(self, line: bytes) -> Document:
        request = _parse(line)
        version = request.get("version")
        if type(version) is not int:
            _refuse(Refusal.MALFORMED, "a request needs a version, a whole number")
        if version != PROTOCOL_VERSION:
            _refuse(Refusal.VERSION, f"this device speaks version {PROTOCOL_VERSION}, not {version}")
        if unknown := request.keys() - {"version", "command", "arguments"}:
            _refuse(Refusal.MALFORMED, f"a request has no key {_shown(min(unknown))}")
        command = request.get("command")
        if not isinstance(command, str):
            _refuse(Refusal.MALFORMED, "a request needs a command, a text")
        if command not in self._commands:
            known = ", ".join(self._commands)
            _refuse(Refusal.UNKNOWN_COMMAND, f"there is no command {_shown(command)}; there are {known}")
        arguments = request.get("arguments", {})
        if not isinstance(arguments, dict):
            _refuse(Refusal.MALFORMED, "arguments are an object")
        return self._commands[command](arguments)

    # ------------------------------------------------------------------ the commands

    def _status(self, arguments: Mapping[str, object]) -> Document:
        _take("status", arguments)
        facts = self._service.session_facts()
        device = self._service.device
        return {
            "pid": os.getpid(),
            "session": asdict(facts),
            "device": self._size(facts)
            | {
                "live": device.live,
                "features_offered": names(int(device.config.offered)),
                "features_acked": names(int(device.acked)),
                "hint": device.hint_status.value,
                "discards_inhibited": device.inhibited,
                "poison_val": device.poison_val,
            },
            "statistics": self._statistics(),
            "metrics": self._counters(),
        }

    def _metrics(self, arguments: Mapping[str, object]) -> Document:
        _take("metrics", arguments)
        return self._counters()

    def _resize(self, arguments: Mapping[str, object]) -> Document:
        guest, balloon = _take("resize", arguments, "guest_bytes", "balloon_bytes")
        if (guest is None) == (balloon is None):
            _refuse(Refusal.INVALID_ARGUMENT, "resize takes either guest_bytes or balloon_bytes")
        facts = self._service.session_facts()
        if guest is not None:
            size = _bytes("guest_bytes", guest)
            if not facts.memory_bytes:
                _refuse(
                    Refusal.REFUSED,
                    "how much memory the guest has is not known before its driver runs; "
                    "ask for a size of the balloon instead",
                )
            balloon_size = facts.memory_bytes - size
        else:
            size = balloon_size = _bytes("balloon_bytes", balloon)
        if balloon_size < 0 or (facts.memory_bytes and balloon_size > facts.memory_bytes):
            have = format_size(facts.memory_bytes)
            _refuse(Refusal.INVALID_ARGUMENT, f"{format_size(size)} is more than the guest has: {have}")
        self._service.device.set_target(balloon_size >> PAGE_SHIFT)
        return self._size(facts) | {"live": self._service.device.live}

    def _stats(self, arguments: Mapping[str, object]) -> Document:
        _take("stats", arguments)
        before = self._service.device.metrics.stats_updates
        requested = self._service.device.request_stats()
        # A driver in the same process has answered already; over vhost-user the answer comes
        # later, and `updates` of a later status is higher.
        return {"requested": requested, "updates": before, "statistics": self._statistics()}

    def _hint(self, arguments: Mapping[str, object]) -> Document:
        (action,) = _take("hint", arguments, "action")
        device = self._service.device
        if action == "start":
            cmd_id = device.hint_start()
            return {"hint": device.hint_status.value, "cmd_id": cmd_id}
        if action == "stop":
            device.hint_stop()
        elif action == "done":
            device.hint_done()
        else:
            _refuse(Refusal.INVALID_ARGUMENT, "the action of hint is start, stop or done")
        return {"hint": device.hint_status.value}

    # ------------------------------------------------------------------ parts of answers

    def _size(self, facts: SessionFacts) -> Document:
        device = self._service.device
        target, actual = device.target << PAGE_SHIFT, device.actual << PAGE_SHIFT
        return {
            "memory_bytes": facts.memory_bytes,
            "target_bytes": target,
            "actual_bytes": actual,
            # A guest writes `actual` as it likes.
            "guest_bytes": max(facts.memory_bytes - actual, 0),
        }

    def _statistics(self) -> Document:
        return {tag.name.lower(): value for tag, value in self._service.device.stats.items()}

    def _counters(self) -> Document:
        return {
            "device": self._service.device.metrics.as_dict(),
            "vhost_user": self._service.metrics.as_dict(),
            "control": self.metrics.as_dict(),
        }


class _RequestError(Exception):
    def __init__(self, kind: Refusal, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _refuse(kind: Refusal, message: str) -> NoReturn:
    raise _RequestError(kind, message)


def _encode(answer: Document) -> bytes:
    return json.dumps({"version": PROTOCOL_VERSION} | answer, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> dict[str, object]:
    try:
        request = json.loads(line.decode())
    except (ValueError, RecursionError):
        # UnicodeDecodeError and JSONDecodeError are ValueErrors; brackets nested 4000 deep are not.
        _refuse(Refusal.MALFORMED, "a request is one line of JSON in UTF-8")
    if not isinstance(request, dict):
        _refuse(Refusal.MALFORMED, "a request is a JSON object")
    return request


# The values of `keys`, None where an argument is not given.
def _take(command: str, arguments: Mapping[str, object], *keys: str) -> list[object]:
    if unknown := arguments.keys() - set(keys):
        _refuse(Refusal.INVALID_ARGUMENT, f"{command} has no argument {_shown(min(unknown))}")
    return [arguments.get(key) for key in keys]


def _bytes(key: str, value: object) -> int:
    if type(value) is not int or value < 0 or value >= 1 << 64:
        _refuse(Refusal.INVALID_ARGUMENT, f"{key} is a whole number of bytes")
    if value % PAGE_SIZE:
        _refuse(Refusal.INVALID_ARGUMENT, f"{key} {value} is not a multiple of {PAGE_SIZE}")
    return value


# What a client sent comes back to it cut short and in ASCII.
def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")
