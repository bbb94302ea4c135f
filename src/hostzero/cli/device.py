# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero device``: a balloon device for a virtual machine, by QEMU's conventions for backends.

The conventions (QEMU's `docs/interop/vhost-user.rst`): ``--socket-path`` or ``--fd``,
``--print-capabilities``, a description file, and SIGTERM ends it quickly and cleanly (as SIGHUP does here).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hostzero.cli.device_log import DeviceLog
from hostzero.cli.main import run
from hostzero.document import to_json
from hostzero.errors import UsageError
from hostzero.termination import ending_signals

if TYPE_CHECKING:
    from hostzero.vhost_user.server import Extra, Service
    from hostzero.vhost_user.sockets import Endpoint

PROGRAM: Final = "hostzero-device"
CAPABILITIES: Final = {"type": "balloon", "features": []}
"""`VHostUserBackendCapabilities` of QEMU's `docs/interop/vhost-user.json`: the type is one of the
schema's, and it defines no feature for balloons."""
_SCHEMES: Final = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))


@click.command(name="device")
@click.option("--socket-path", type=click.Path(path_type=Path), metavar="PATH", help="Listen on this socket.")
@click.option("--fd", type=int, metavar="N", help="Serve this descriptor: a socket, listening or connected.")
@click.option("--print-capabilities", is_flag=True, help="Print what this backend is, as JSON, and exit.")
@click.option("--print-description", is_flag=True, help="Print a description file for QEMU, and exit.")
@click.option(
    "--features", metavar="LIST", help="Offer these, or change the default: +page-poison,-stats-vq."
)
@click.option(
    "--discard-hints", is_flag=True, help="Discard hinted pages (dangerous, see docs/vhost-user.md)."
)
@click.option(
    "--control",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Make a control socket there, for hostzero ctl and hostzero top.",
)
@click.option(
    "--metrics",
    metavar="[ADDR:]PORT",
    help="Serve metrics to Prometheus, on 127.0.0.1 unless another address is named; port 0 is any free one.",
)
@click.option("--verbose", is_flag=True, help="Log sessions and queues too, not only what is wrong.")
def command(
    *,
    socket_path: Path | None,
    fd: int | None,
    print_capabilities: bool,
    print_description: bool,
    features: str | None,
    discard_hints: bool,
    control: Path | None,
    metrics: str | None,
    verbose: bool,
) -> None:
    """Be the balloon device of a virtual machine, over vhost-user.

    QEMU (10.2 or newer) takes the other end of the socket:

    \b
      -object memory-backend-memfd,id=m0,size=4G,share=on -machine q35,memory-backend=m0
      -chardev socket,id=c0,path=PATH
      -device vhost-user-test-device-pci,chardev=c0,virtio-id=5,num_vqs=5,vq_size=128,config_size=16

    One guest is served at a time; when it goes the next one may come. Started by systemd with a
    socket, it needs neither --socket-path nor --fd. SIGTERM ends it, and so does SIGHUP
    except under nohup.
    """  # noqa: D301 - Click knows what not to wrap by the character, not by its name
    if print_capabilities:
        click.echo(to_json(CAPABILITIES), nl=False)
        return
    from hostzero.vhost_user.description import description
    from hostzero.vhost_user.oversight import oversee, parse_address
    from hostzero.vhost_user.server import Service, device_config
    from hostzero.vhost_user.sockets import open_endpoint
    from hostzero.virtio.features import adjust_features

    if print_description:
        click.echo(to_json(description(find_program())), nl=False)
        return
    from hostzero.device import DEFAULT_FEATURES

    offered = DEFAULT_FEATURES if features is None else adjust_features(features, DEFAULT_FEATURES)
    service = Service(device_config(offered, discard_hints=discard_hints))
    _log_to_stderr(service, verbose=verbose)
    address = None if metrics is None else parse_address(metrics)
    overseer = functools.partial(oversee, control=control, metrics=address, tell=_tell)
    with open_endpoint(socket_path, fd) as endpoint:
        asyncio.run(_serve(service, endpoint, overseer))


async def _serve(service: Service, endpoint: Endpoint, overseer: Extra) -> None:
    stop = asyncio.Event()
    for number in ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serve = service.serve if endpoint.listening else service.serve_connection
    serving = asyncio.ensure_future(serve(endpoint.detach(), [overseer]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        # SIGINT comes here too, as the cancelling of this task, and then as KeyboardInterrupt.
        serving.cancel()
        stopping.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)


def find_program() -> Path:
    """Return the absolute path of the installed ``hostzero-device``.

    It lies beside the `hostzero` that was called, beside the interpreter of a virtual environment,
    among the scripts of the whole machine or of the user, or in PATH: the first that is there counts.

    Raises:
        UsageError: there is none.
    """
    folders = [Path(sys.argv[0]).parent, Path(sys.executable or sys.argv[0]).parent]
    folders += [Path(sysconfig.get_path("scripts", scheme)) for scheme in _SCHEMES]
    places = [(folder / PROGRAM).absolute() for folder in folders]
    if in_path := shutil.which(PROGRAM):
        places.append(Path(in_path).absolute())
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise UsageError(f"--print-description: there is no program {PROGRAM} to name: is hostzero installed?")


def main() -> None:
    """Run ``hostzero-device``: the command alone, as a description file has to name it."""
    sys.exit(run(["device", *sys.argv[1:]]))


def _tell(text: str) -> None:
    click.echo(f"hostzero device: {text}", err=True)


def _log_to_stderr(service: Service, *, verbose: bool) -> None:
    log = logging.getLogger("hostzero")
    log.handlers[:] = [DeviceLog(lambda: service.label)]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
