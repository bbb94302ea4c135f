# SPDX-License-Identifier: GPL-2.0-only
"""The control socket and the metrics endpoint of one backend, opened and closed together."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
from contextlib import AsyncExitStack
from pathlib import Path

from hostzero.vhost_user.control import ControlServer
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.control_commands import Service

_log = logging.getLogger(__name__)


async def oversee(
    service: Service, *, control: Path | None = None, metrics: tuple[str, int] | None = None
) -> None:
    """Let `service` be steered and watched in the running loop, until cancelled.

    Args:
        service: the running backend.
        control: where the control socket is to be; None for none.
        metrics: the host and port for Prometheus (`parse_address`); None for none.

    Raises:
        UsageError: the socket cannot be made, or the address cannot be listened on.
    """
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(ControlServer(service))
        if control is not None:
            await server.listen(control)
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
            _log.info("metrics: %s", endpoint.url)
        await asyncio.Event().wait()
