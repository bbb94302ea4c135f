# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero ctl``: one request to a running device's control socket, and its answer as text or JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hostzero.document import to_json
from hostzero.errors import ControlError, UsageError
from hostzero.units import parse_size

if TYPE_CHECKING:
    from rich.console import Console

    from hostzero.vhost_user.control_client import ControlClient

_STATS_SECONDS: Final = 2.0
_WAIT_SECONDS: Final = 60.0

_json = click.option("--json", "as_json", is_flag=True, help="Write the answer as JSON.")


@click.group(name="ctl")
@click.argument("socket", type=click.Path(path_type=Path))
@click.pass_context
def command(ctx: click.Context, socket: Path) -> None:
    """Steer a running device over its control SOCKET (hostzero device --control SOCKET).

    Exit status: 0 done; 1 the device refused or did not answer; 2 a wrong argument, or no device
    at SOCKET.
    """
    ctx.obj = socket


@command.command()
@click.argument("size", required=False)
@click.option("--balloon", metavar="SIZE", help="The balloon's size instead; 0 gives everything back.")
@click.option("--wait", is_flag=True, help="Wait until the guest has got there.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help=f"How long to wait.  [default: {_WAIT_SECONDS:g}]",
)
@_json
@click.pass_obj
def resize(
    socket: Path, *, size: str | None, balloon: str | None, wait: bool, timeout: float | None, as_json: bool
) -> None:
    """Leave the guest SIZE of its memory, as in 2G; the balloon takes the rest.

    SIZE is what remains for the guest, as with QEMU's QMP command balloon. With --balloon it is
    what the balloon takes. The guest gives memory up as fast as it can, and not all of it if it
    needs it; if its driver is not running, it starts when the driver does.
    """
    if (size is None) == (balloon is None):
        raise UsageError("give either SIZE, what the guest keeps, or --balloon SIZE, what the balloon takes")
    if timeout is not None and not wait:
        raise UsageError("--timeout is for --wait")
    arguments = (
        {"guest_bytes": parse_size(size)} if size is not None else {"balloon_bytes": _balloon(balloon)}
    )
    from hostzero.cli.ctl_wait import open_progress, wait_for_target
    from hostzero.cli.device_view import resized

    with _open(socket) as client:
        result = client.request("resize", **arguments)
        if wait:
            with open_progress() as progress:
                seconds = _WAIT_SECONDS if timeout is None else timeout
                result = wait_for_target(client, result["target_bytes"], seconds, progress)
    _output(result, as_json, lambda console: console.print(resized(result), highlight=False))


@command.command()
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=_STATS_SECONDS,
    metavar="SECONDS",
    help=f"How long the guest may take to answer.  [default: {_STATS_SECONDS:g}]",
)
@_json
@click.pass_obj
def stats(socket: Path, *, timeout: float, as_json: bool) -> None:
    """Ask the guest for fresh statistics and show them.

    A guest that does not answer in time leaves the latest ones; "fresh" says which they are.
    """
    from hostzero.cli.ctl_wait import fetch_statistics
    from hostzero.cli.device_view import print_statistics

    with _open(socket) as client:
        result = fetch_statistics(client, timeout)
    if not result["statistics"]:
        raise ControlError("the guest has sent no statistics: its driver is not running, or lacks stats-vq")
    _output(result, as_json, lambda console: print_statistics(result, console))


@command.command()
@click.argument("action", type=click.Choice(["start", "stop", "done"]))
@_json
@click.pass_obj
def hint(socket: Path, *, action: str, as_json: bool) -> None:
    """Start or end a run of free page hinting.

    start asks for hints, stop wants no more, done also lets the guest have the hinted pages back.
    Always end with done: until then the guest is short of them.
    """
    with _open(socket) as client:
        result = client.request("hint", action=action)
    _output(result, as_json, lambda console: console.print(f"hinting: {result['hint']}", highlight=False))


@command.command()
@_json
@click.pass_obj
def status(socket: Path, *, as_json: bool) -> None:
    """Show the session, the balloon, the queues, the guest's statistics and what went wrong."""
    from hostzero.cli.device_view import print_status

    with _open(socket) as client:
        result = client.request("status")
    _output(result, as_json, lambda console: print_status(result, console))


@command.command()
@_json
@click.pass_obj
def metrics(socket: Path, *, as_json: bool) -> None:
    """Show every counter."""
    from hostzero.cli.device_view import print_metrics

    with _open(socket) as client:
        result = client.request("metrics")
    _output(result, as_json, lambda console: print_metrics(result, console))


def _balloon(size: str | None) -> int:
    assert size is not None, "one of the two was given"
    return 0 if size.strip() == "0" else parse_size(size)


def _open(socket: Path) -> ControlClient:
    from hostzero.vhost_user.control_client import ControlClient

    return ControlClient.open(socket)


def _output(result: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        click.echo(to_json(result), nl=False)
        return
    from hostzero.render import open_console

    show(open_console(to_stderr=False))
