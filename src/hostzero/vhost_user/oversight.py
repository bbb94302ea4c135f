# SPDX-License-Identifier: GPL-2.0-only
"""The control socket and the metrics endpoint of one backend, opened and closed together."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from hostzero.errors import UsageError
from hostzero.vhost_user.control import BACKLOG, ControlServer
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.control_commands import Service
from hostzero.vhost_user.sockets import listen

_log = logging.getLogger(__name__)


async def oversee(
    service: Service,
    *,
    control: Path | None = None,
    metrics: tuple[str, int] | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Let `service` be steered and watched in the running loop, until cancelled.

    Args:
        service: the running backend.
        control: where the control socket is to be; None for none.
        metrics: the host and port for Prometheus (`parse_address`); None for none.
        tell: hears where the metrics are if their port is chosen here; default: the log, as for a
            port that was named.

    Raises:
        UsageError: the socket cannot be made, or the address cannot be listened on.
    """
    async with AsyncExitStack() as stack:
        listener = None
        if control is not None:
            # Whoever may connect may do what the backend may do.
            listener = stack.enter_context(listen(control, "--control", mode=0o600, backlog=BACKLOG))
        server = await stack.enter_async_context(ControlServer(service))
        if listener is not None:
            await server.listen(listener)
            _log.info("control socket: %s", control)
        if metrics is not None:
            # Here, because the library takes a tenth of a second to load.
            from hostzero.vhost_user.prometheus import MetricsEndpoint, scrape  # noqa: PLC0415

            client = stack.enter_context(ControlClient(await server.connect()))
            endpoint = MetricsEndpoint(metrics, functools.partial(scrape, client))
            # A scrape under way needs the loop to hear that there will be no answer.
            stack.push_async_callback(asyncio.to_thread, endpoint.close)
            stack.push_async_callback(server.close)
            if not ipaddress.ip_address(metrics[0]).is_loopback:
                _log.warning("metrics are served to other machines, without any check: %s", endpoint.url)
            if tell is not None and metrics[1] == 0:
                tell(f"metrics: {endpoint.url}")
            else:
                _log.info("metrics: %s", endpoint.url)
        await asyncio.Event().wait()


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and port of ``PORT``, ``ADDR:PORT`` or ``[ADDR]:PORT``.

    Without an address it is 127.0.0.1: the figures tell strangers what a guest does, so that
    only who names an address serves others.

    Raises:
        UsageError: it is no numeric address, or no port from 0 to 65535 (0: any free one).
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(f"--metrics {text}: {host!r} is no address such as 127.0.0.1 or [::1]") from None
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise UsageError(f"--metrics {text}: {port!r} is no port; write PORT or ADDR:PORT")
    return str(address), int(port)
