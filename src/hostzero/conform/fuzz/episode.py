# SPDX-License-Identifier: GPL-2.0-only
"""One connection: what is sent in it, and what is checked after it.

::

    connect -> malformed messages -> driver starts -> its requests are right
                   ^                                         |
                   |                                         v
                   +---- rings are stopped, memory checked <- hostile rings, messages, control
                   |
                   v
    a bad end -> nothing of the session is left, and the next client of the control socket is answered

An episode is drawn from its own seed, and nothing that is drawn depends on an answer: the same
number sends the same bytes again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

from hostzero.conform.fuzz import control_garbage, endings, messages, wild
from hostzero.conform.fuzz.arena import LOW_GPAS, Arena
from hostzero.conform.fuzz.driver import Driver
from hostzero.conform.fuzz.finding import Ended, Found, Kind
from hostzero.conform.fuzz.peer import Log, Peer
from hostzero.conform.fuzz.watch import PATIENCE, Watch

SYNC_EVERY: Final = 8
"""Messages between two looks at whether they were read."""

_COMM: Final = Path("/proc/self/comm")
_NAMES: Final = (b"\xff\xfe\n\x1b[31mname", b"x\nhostzero: y", b"balloon) S 1 (")
"""What a process may call itself; a backend that logs its peer reads this."""


class Episode:
    """One connection to a backend."""

    def __init__(self, socket: Path, control: Path | None, watch: Watch, log: Log, strict: bool) -> None:
        """Go against the backend at `socket`; `strict` says whether it may not end sessions of its own."""
        self._socket = socket
        self._control = control
        self._watch = watch
        self._log = log
        self._strict = strict

    def run(self, seed: int, number: int) -> None:
        """Play the episode.

        Raises:
            Found: something does not hold.
        """
        rng = Random(f"{seed} {number}")
        self._log.note("connection", f"episode {number}")
        with _named(rng):
            peer = self._connect()
            try:
                self._session(rng, peer)
            except Ended:
                self._log.answers["ended"] += 1
                self._watch.alive_or_silent(Ended())
                if self._strict:
                    raise Found(
                        Kind.ENDED, "the session was ended, and no message had broken its framing"
                    ) from None
            finally:
                peer.close()
            self._watch.settled()
            self._watch.fresh_status()

    # A backend that has not noticed yet that the last front end has left sends this one away.
    def _connect(self) -> Peer:
        deadline = time.monotonic() + PATIENCE
        while True:
            peer = Peer(self._socket, self._log)
            try:
                peer.sync()
            except Ended:
                peer.close()
                self._watch.alive_or_silent(Ended())
                if time.monotonic() > deadline:
                    raise Found(Kind.ENDED, f"no front end is served for {PATIENCE:g} s") from None
            except BaseException:
                peer.close()
                raise
            else:
                return peer

    def _session(self, rng: Random, peer: Peer) -> None:
        lives = rng.choice((0, 1, 1, 2, 3))
        with contextlib.closing(Arena(0)) as arena:
            self._messages(rng, peer, arena)
            arena.check()
            self._watch.busy()
        for life in range(lives):
            with contextlib.closing(Arena(rng.choice(LOW_GPAS))) as arena:
                driver = Driver(peer, arena)
                with contextlib.closing(driver):
                    self._life(rng, driver)
                    if life == lives - 1:
                        self._end(rng, peer, arena)
        if not lives:
            endings.end(rng, peer, self._watch)

    def _life(self, rng: Random, driver: Driver) -> None:
        driver.start(rng)
        for _ in range(rng.randrange(1, 6)):
            driver.work(rng)
        driver.arena.check()
        for _ in range(rng.randrange(1, 12)):
            if self._control is not None and rng.random() < 0.1:
                control_garbage.pester(rng, self._control, self._log)
            wild.misbehave(rng, driver)
        driver.peer.sync()
        if rng.random() < 0.5:
            self._messages(rng, driver.peer, driver.arena)
        if rng.random() < 0.1:
            endings.intrude(rng, self._socket, driver.peer)
        self._watch.status()
        self._watch.busy()
        driver.stop()
        driver.arena.check()

    # Rings that run when the end comes are another case than those that do not.
    def _end(self, rng: Random, peer: Peer, arena: Arena) -> None:
        if rng.random() < 0.1:
            self._log.note("memory: cut short", "to nothing, and two messages")
            arena.cut()
        endings.end(rng, peer, self._watch)

    def _messages(self, rng: Random, peer: Peer, arena: Arena) -> None:
        for count in range(rng.randrange(24)):
            messages.send_any(rng, peer, arena)
            if count % SYNC_EVERY == SYNC_EVERY - 1:
                peer.sync()
        peer.sync()


@contextlib.contextmanager
def _named(rng: Random) -> Iterator[None]:
    name = rng.choice(_NAMES) if rng.random() < 0.2 else None
    if name is None:
        yield
        return
    before = _COMM.read_bytes().rstrip(b"\n")
    _COMM.write_bytes(name)
    try:
        yield
    finally:
        _COMM.write_bytes(before)
