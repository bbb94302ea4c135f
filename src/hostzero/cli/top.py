# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero top``: a device's status again and again, as a live view, as text or as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from hostzero.document import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from hostzero.vhost_user.control_client import ControlClient

_INTERVAL: Final = 1.0
_QUIT: Final = frozenset("qQ\x1b\x04")


@click.command(name="top")
@click.argument("socket", type=click.Path(path_type=Path))
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=_INTERVAL,
    metavar="SECONDS",
    help=f"The time between two looks.  [default: {_INTERVAL:g}]",
)
@click.option("--once", is_flag=True, help="Look once, without rates.")
@click.option("--json", "as_json", is_flag=True, help="Write each look as one JSON document.")
def command(socket: Path, *, interval: float, once: bool, as_json: bool) -> None:
    """Watch the device behind the control SOCKET (hostzero device --control SOCKET).

    Shows the balloon, memory given back and proven zero, the claims made, discards by size, the
    guest's statistics and everything that went wrong. On a terminal it is redrawn; q or Ctrl-C
    ends it. Elsewhere each look is printed below the one before.
    """
    from hostzero.vhost_user.control_client import ControlClient

    with ControlClient.open(socket) as client:
        if as_json:
            _write_json(client, interval, once)
            return
        from hostzero.render import open_console

        console = open_console(to_stderr=False)
        if once or not console.is_terminal:
            _print(client, console, interval, once)
        else:
            _watch(client, console, interval)


def _looks(client: ControlClient) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, float]]:
    # Status after status, each with the one before it and the seconds between them.
    before, looked = None, time.monotonic()
    while True:
        status = client.request("status")
        now = time.monotonic()
        yield status, before, now - looked
        # The answer comes when it comes; the next look has it.
        client.request("stats")
        before, looked = status, now


def _write_json(client: ControlClient, interval: float, once: bool) -> None:
    for status, _, _ in _looks(client):
        document = {"time": time.time(), **status}
        click.echo(to_json(document) if once else json.dumps(document) + "\n", nl=False)
        if once:
            return
        sys.stdout.flush()
        time.sleep(interval)


def _print(client: ControlClient, console: Console, interval: float, once: bool) -> None:
    from hostzero.cli.top_view import render

    for look in _looks(client):
        console.print(render(*look), highlight=False)
        if once:
            return
        console.print()
        console.file.flush()
        time.sleep(interval)


def _watch(client: ControlClient, console: Console, interval: float) -> None:
    from rich.live import Live

    from hostzero.cli.top_view import render

    with (
        _signals(),
        _keys() as pressed,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for look in _looks(client):
            live.update(render(*look), refresh=True)
            if pressed(interval):
                return


# A signal that would end the process ends the view first. Stopped in the middle of the view, the
# terminal would be of no use to the shell, so Ctrl-Z does nothing.
@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    saved = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    saved[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


# Gives a function that waits and says whether a key to quit was pressed meanwhile.
@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    if not sys.stdin.isatty():
        yield _sleep
        return
    descriptor = sys.stdin.fileno()
    saved = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([descriptor], [], [], left)[0]:
                typed = os.read(descriptor, 64)
                if not typed or _QUIT & set(typed.decode(errors="ignore")):
                    return True
        return False

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False
