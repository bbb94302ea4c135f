# SPDX-License-Identifier: GPL-2.0-only
"""Episode after episode against one backend, until something is found or the time is up."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostzero.conform.fuzz.episode import Episode
from hostzero.conform.fuzz.finding import Finding, Found
from hostzero.conform.fuzz.peer import Log, connect
from hostzero.conform.fuzz.watch import Watch
from hostzero.errors import UsageError
from hostzero.vhost_user.connection import Peer as Credentials


@dataclass
class FuzzReport:
    """What became of a run.

    Attributes:
        target: the socket.
        seed: of the run.
        seconds: how long it took.
        episodes: connections that were played.
        done: what was sent, by kind.
        answers: what came back, by kind.
        figures: what the backend's process used, as far as it can be seen.
        notes: checks that were left out, and why.
        finding: what was found; None for nothing.
    """

    target: str
    seed: int
    seconds: float = 0.0
    episodes: int = 0
    done: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    figures: dict[str, int | float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finding: Finding | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.finding is None

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON has words for."""
        return {
            "target": self.target,
            "ok": self.ok,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "episodes": self.episodes,
            "done": dict(sorted(self.done.items())),
            "answers": dict(sorted(self.answers.items())),
            "backend": self.figures,
            "left_out": self.notes,
            "finding": None if self.finding is None else self.finding.to_json(),
        }


def fuzz(
    path: Path,
    *,
    seconds: float,
    seed: int,
    control: Path | None = None,
    episode: int | None = None,
    progress: Callable[[float, int, int], None] = lambda _spent, _episodes, _steps: None,
    clock: Callable[[], float] = time.monotonic,
) -> FuzzReport:
    """Fuzz the idle backend that listens at `path`.

    Args:
        path: its vhost-user socket.
        seconds: how long; the episode under way is played to its end.
        seed: what is sent follows from it.
        control: the control socket of a hostzero device. Such a device ends no session by itself,
            and is held to that.
        episode: play this one alone, once.
        progress: hears seconds, episodes and steps after each episode.
        clock: tells seconds.

    Raises:
        UsageError: nobody listens at `path` or `control`.
    """
    watch = Watch(_pid_of(path), control)
    log = Log()
    report = FuzzReport(str(path), seed, notes=watch.notes)
    player = Episode(path, control, watch, log, strict=control is not None)
    began = clock()
    number = 0 if episode is None else episode
    try:
        while report.finding is None:
            before = log.steps
            try:
                player.run(seed, number)
            except Found as found:
                report.finding = Finding(
                    found.kind, str(found), seed, number, log.steps - before, tuple(log.last)
                )
            report.episodes += 1
            report.seconds = clock() - began
            progress(report.seconds, report.episodes, log.steps)
            number += 1
            if episode is not None or report.seconds >= seconds:
                break
        report.figures = watch.figures()
    finally:
        watch.close()
    report.done, report.answers = dict(log.done), dict(log.answers)
    return report


# Who listens at a socket: with systemd's activation that is not who serves it, so that a control
# socket, which says it itself, goes before this.
def _pid_of(path: Path) -> int:
    try:
        sock = connect(path)
    except TimeoutError as error:
        raise UsageError(f"{path}: {error} there: does it serve somebody else?") from error
    except OSError as error:
        raise UsageError(f"{path}: no backend listens there: {error.strerror or error}") from error
    with sock:
        pid = Credentials.of(sock).pid
        # What the backend holds for this connection must not count as what it holds when idle: it is
        # told that nothing comes, and waited for until it has closed.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 12):
                pass
        return pid
