# SPDX-License-Identifier: GPL-2.0-only
"""The control socket and the metrics endpoint of one backend, opened and closed together."""

from __future__ import annotations

import functools
import ipaddress
import logging
import selectors
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hostzero.vhost_user.control import ControlServer
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.control_commands import Service

_log = logging.getLogger(__name__)


@contextmanager
def oversight(
    service: Service,
    selector: selectors.BaseSelector,
    *,
    control: Path | None = None,
    metrics: tuple[str, int] | None = None,
) -> Iterator[ControlServer]:
    """Let `service` be steered and watched as long as the context lasts.

    Args:
        service: the running backend.
        selector: its loop; see `ControlServer`. The context begins and ends in its thread, before
            and after the loop runs.
        control: where the control socket is to be; None for none.
        metrics: the host and port for Prometheus (`parse_address`); None for none.

    Raises:
        UsageError: the socket cannot be made, or the address cannot be listened on.
    """
    with ExitStack() as stack:
        server = stack.enter_context(ControlServer(service, selector))
        if control is not None:
            server.listen(control)
            _log.info("control socket: %s", control)
        if metrics is not None:
            # Here, because the library takes a tenth of a second to load.
            from hostzero.vhost_user.prometheus import MetricsEndpoint, scrape  # noqa: PLC0415

            client = stack.enter_context(ControlClient(server.connect()))
            endpoint = stack.enter_context(MetricsEndpoint(metrics, functools.partial(scrape, client)))
            if not ipaddress.ip_address(metrics[0]).is_loopback:
                _log.warning("metrics are served to other machines, without any check: %s", endpoint.url)
            _log.info("metrics: %s", endpoint.url)
            # First of all at the end: a scrape that waits for an answer has lost its loop.
            stack.callback(server.close)
        yield server
