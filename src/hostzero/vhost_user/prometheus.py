# SPDX-License-Identifier: GPL-2.0-only
"""A device's figures for Prometheus: names, units, help, and the HTTP endpoint.

Names follow Prometheus: base units, ``_total`` for what only grows. docs/control.md lists them.
The figures come over a control connection, so that the endpoint's thread shares nothing with
the device and a scrape is one moment's truth.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hostzero.device import DISCARD_SIZE_BOUNDS
from hostzero.errors import HostzeroError, UsageError
from hostzero.vhost_user.control_client import ControlClient
from hostzero.virtio.features import QueueRole

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 5.0
"""How long a scraper may take over its request. Scrapes are served one after another."""

_HANG_UP_EVERY: Final = 0.05

Status = Mapping[str, Any]

_DISCARDING: Final = (QueueRole.INFLATE.value, QueueRole.FREE_PAGE.value, QueueRole.REPORTING.value)
_PFN_QUEUES: Final = (QueueRole.INFLATE.value, QueueRole.DEFLATE.value)
_ALL_QUEUES: Final = tuple(role.value for role in QueueRole)

# Counter of a queue: metric, queues that can have it, help.
_OF_A_QUEUE: Final[Mapping[str, tuple[str, tuple[str, ...], str]]] = {
    "requests": ("hostzero_queue_requests", _ALL_QUEUES, "Buffers taken from the queue."),
    "malformed": (
        "hostzero_queue_malformed_requests",
        _ALL_QUEUES,
        "Buffers that broke a rule and were returned unserved.",
    ),
    "interrupts": ("hostzero_queue_interrupts", _ALL_QUEUES, "Used buffer notifications that were sent."),
    "pfns": ("hostzero_queue_pfns", _PFN_QUEUES, "Page frame numbers that requests named."),
    "runs": ("hostzero_queue_runs", _PFN_QUEUES[:1], "Runs into which page frame numbers were joined."),
    "discard_failed": ("hostzero_discard_failures", _DISCARDING, "Discards that failed or proved nothing."),
    "proven_zero_bytes": (
        "hostzero_proven_zero_bytes",
        _DISCARDING,
        "Bytes that discards proved to read as zero.",
    ),
    "claims": (
        "hostzero_zero_claims",
        _DISCARDING,
        "Pages or buffers that the driver was told to be zero.",
    ),
    "claimed_zero_bytes": (
        "hostzero_claimed_zero_bytes",
        _DISCARDING,
        "Bytes that the driver was told to be zero.",
    ),
}

_OF_THE_DEVICE: Final[Mapping[str, tuple[str, str]]] = {
    "config_changes": ("hostzero_config_changes", "Configuration changes that were announced."),
    "resets": ("hostzero_resets", "Resets of the device."),
    "refused_negotiations": ("hostzero_refused_negotiations", "Feature sets that were turned down."),
    "orphan_init_reported": (
        "hostzero_orphan_init_reported",
        "Drivers that took bit 6 without REPORTING, meaning another feature by it.",
    ),
    "broken_queues": ("hostzero_broken_queues", "Queues given up until a reset."),
    "stats_updates": ("hostzero_stats_updates", "Statistics buffers that were read."),
    "hinted_bytes": ("hostzero_hinted_bytes", "Bytes of free page hints."),
}

# Statistics: metric, whether it only grows in the guest, help. The kernel sends memory in bytes.
_OF_THE_GUEST: Final[Mapping[str, tuple[str, bool, str]]] = {
    "swap_in": ("swapped_in_bytes", True, "Memory swapped in."),
    "swap_out": ("swapped_out_bytes", True, "Memory swapped out."),
    "majflt": ("major_faults", True, "Major page faults."),
    "minflt": ("minor_faults", True, "Minor page faults."),
    "memfree": ("free_bytes", False, "Memory that nobody uses."),
    "memtot": ("total_bytes", False, "Memory that the guest has."),
    "avail": ("available_bytes", False, "Memory that a new program could have without swapping."),
    "caches": ("cache_bytes", False, "Memory in the page cache."),
    "htlb_pgalloc": ("hugetlb_allocations", True, "Huge pages allocated."),
    "htlb_pgfail": ("hugetlb_failures", True, "Huge pages that could not be allocated."),
    "oom_kill": ("oom_kills", True, "Processes killed for want of memory."),
    "alloc_stall": ("allocation_stalls", True, "Allocations that had to reclaim memory."),
    "async_scan": ("async_scanned_pages", True, "Pages scanned by background reclaim."),
    "direct_scan": ("direct_scanned_pages", True, "Pages scanned by allocations."),
    "async_reclaim": ("async_reclaimed_pages", True, "Pages reclaimed in the background."),
    "direct_reclaim": ("direct_reclaimed_pages", True, "Pages reclaimed by allocations."),
}


def scrape(client: ControlClient) -> Status:
    """Return a status, and ask the guest for statistics, which the next scrape has.

    Raises:
        ControlError: as `ControlClient.request`.
    """
    status = client.request("status")
    client.request("stats")
    return status


class StatusCollector(Collector):
    """Turns the answer to ``status`` into Prometheus metrics, each time somebody asks."""

    def __init__(self, fetch: Callable[[], Status]) -> None:
        """Ask `fetch` for a status."""
        self._fetch = fetch

    def collect(self) -> Iterator[Metric]:
        """Return every metric; what `fetch` raises goes through."""
        status = self._fetch()
        metrics = status["metrics"]
        yield from _gauges(status)
        yield from _queues(metrics["device"])
        for key, (name, text) in _OF_THE_DEVICE.items():
            yield _counter(name, text, metrics["device"][key])
        yield from _others("vhost_user", metrics["vhost_user"])
        yield from _others("control", metrics["control"])
        for tag, value in status["statistics"].items():
            name, grows, text = _OF_THE_GUEST[tag]
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(f"hostzero_guest_{name}", f"As the guest says: {text}", value=value)


def _gauges(status: Status) -> Iterator[Metric]:
    device, session = status["device"], status["session"]
    allocated = 0 if session is None else session["allocated_bytes"]
    for name, text, value in (
        ("hostzero_front_end_connected", "Whether a VMM is connected.", session is not None),
        ("hostzero_driver_running", "Whether the guest's driver is running.", device["live"]),
        ("hostzero_guest_memory_bytes", "Memory of the guest, balloon included.", device["memory_bytes"]),
        ("hostzero_guest_allocated_bytes", "Memory that the host holds for the guest.", allocated),
        ("hostzero_balloon_target_bytes", "Size that the balloon should have.", device["target_bytes"]),
        (
            "hostzero_balloon_actual_bytes",
            "Size that the balloon has, as the guest says.",
            device["actual_bytes"],
        ),
        ("hostzero_discards_inhibited", "Whether discards are forbidden.", device["discards_inhibited"]),
    ):
        yield GaugeMetricFamily(name, text, value=float(value))
    features = GaugeMetricFamily(
        "hostzero_feature_negotiated", "1 if the driver took a feature that is offered.", labels=["feature"]
    )
    for feature in device["features_offered"]:
        features.add_metric([feature], float(feature in device["features_acked"]))
    yield features


def _queues(device: Status) -> Iterator[Metric]:
    for key, (name, queues, text) in _OF_A_QUEUE.items():
        counter = CounterMetricFamily(name, text, labels=["queue"])
        for queue in queues:
            counter.add_metric([queue], device[queue][key])
        yield counter
    skipped = CounterMetricFamily(
        "hostzero_skipped_bytes", "Bytes that were named and not discarded.", labels=["queue", "reason"]
    )
    sizes = HistogramMetricFamily("hostzero_discard_size_bytes", "Discards by length.", labels=["queue"])
    bounds = [*map(str, map(float, DISCARD_SIZE_BOUNDS)), "+Inf"]
    for queue in _DISCARDING:
        counters = device[queue]
        for reason, length in counters["skipped_bytes"].items():
            skipped.add_metric([queue, reason], length)
        buckets = list(zip(bounds, accumulate(counters["discard_sizes"]), strict=True))
        sizes.add_metric([queue], buckets, counters["discarded_bytes"])
    yield skipped
    yield sizes


# The counters of the sockets, by their own names.
def _others(part: str, counters: Status) -> Iterator[Metric]:
    for key, value in counters.items():
        name = f"hostzero_{part}_{key}"
        text = f"{key.replace('_', ' ').capitalize()} of the {part.replace('_', '-')} socket."
        if isinstance(value, Mapping):
            family = CounterMetricFamily(name, text, labels=["kind"])
            for kind, count in value.items():
                family.add_metric([kind], count)
            yield family
        else:
            yield _counter(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


# ---------------------------------------------------------------------- the endpoint


class MetricsEndpoint:
    """An HTTP server for Prometheus in one thread of its own.

    Attributes:
        url: where it is.
    """

    def __init__(self, address: tuple[str, int], fetch: Callable[[], Status]) -> None:
        """Serve the status that `fetch` returns; it is called in the endpoint's thread.

        Raises:
            UsageError: the address cannot be listened on.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(StatusCollector(fetch))
        host, port = address
        ipv6 = ipaddress.ip_address(host).version == 6
        try:
            self._server = make_server(
                host, port, _guarded(registry), _Server6 if ipv6 else _Server, _Handler
            )
        except OSError as error:
            raise UsageError(f"--metrics: cannot listen on {host} port {port}: {error.strerror}") from error
        port = self._server.server_port
        self.url = f"http://[{host}]:{port}/metrics" if ipv6 else f"http://{host}:{port}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close the socket; a scraper that is still talking is hung up on."""
        stopping = threading.Thread(target=self._server.shutdown)
        stopping.start()
        while stopping.is_alive():
            stopping.join(_HANG_UP_EVERY)
            self._server.hang_up()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(WSGIServer):
    current: socket.socket | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        self.current, address = super().get_request()
        return self.current, address

    def hang_up(self) -> None:
        if self.current is not None:
            _hang_up(self.current)

    # The base class looks the address up in the DNS, to no use.
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    # A scraper that goes away or says nothing is no news.
    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("a scrape by %s failed", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# The socket's timeout starts anew with each byte that comes, so a request as a whole has one more. It
# ends before the device is asked, which may take longer; a timeout of `sendall` is for all that it sends.
class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def setup(self) -> None:
        super().setup()
        self._late = threading.Timer(self.timeout, _hang_up, [self.connection])
        self._late.daemon = True
        self._late.start()

    def parse_request(self) -> bool:
        try:
            return super().parse_request()
        finally:
            self._late.cancel()

    def finish(self) -> None:
        self._late.cancel()
        self._late.join()
        super().finish()

    # One line a scrape would fill the log.
    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)


# A device that does not answer is a 503, and no traceback in the log.
def _guarded(registry: CollectorRegistry) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    app = make_wsgi_app(registry)

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return app(environ, start_response)  # type: ignore[no-any-return]
        except HostzeroError as error:
            start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{error}\n".encode()]

    return serve
