# SPDX-License-Identifier: GPL-2.0-only
"""Metrics as a Prometheus server reads them, over HTTP from a device in a loop."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hostzero.device import DISCARD_SIZE_BOUNDS, SkipReason
from hostzero.errors import ControlError, UsageError
from hostzero.units import PAGE_SIZE, Gpa
from hostzero.vhost_user import prometheus
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.control_commands import Commands
from hostzero.vhost_user.prometheus import MetricsEndpoint, StatusCollector, scrape
from hostzero.virtio.balloon import StatTag
from hostzero.virtio.features import QueueRole
from tests.device.guest import BITMAP_AT, RAM_BYTES, Guest
from tests.vhost_user.control_service import FakeService, Loop

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "control.md"

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def status_of(service: FakeService) -> dict[str, Any]:
    answer = json.loads(Commands(service).answer(b'{"version":1,"command":"status"}'))
    result: dict[str, Any] = answer["result"]
    return result


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def exported(status: Mapping[str, Any]) -> Samples:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(lambda: status))
    return parse(generate_latest(registry).decode())


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


@pytest.fixture
def endpoint(loop: Loop, tmp_path: Path) -> Iterator[MetricsEndpoint]:
    inside = loop.run(loop.server.connect())
    with (
        loop.running(tmp_path / "ctl"),
        ControlClient(inside) as client,
        MetricsEndpoint(("127.0.0.1", 0), functools.partial(scrape, client)) as made,
    ):
        yield made


def test_what_a_guest_did_is_exported(service: FakeService, guest: Guest) -> None:
    guest.device.set_target(300)
    guest.inflate([5, 6, 7, 9])
    guest.send(QueueRole.INFLATE, [(BITMAP_AT, 3)])
    guest.device.write_config(4, struct.pack("<I", 200))
    samples = exported(status_of(service))
    assert samples[key("hostzero_balloon_target_bytes")] == 300 * PAGE_SIZE
    assert samples[key("hostzero_balloon_actual_bytes")] == 200 * PAGE_SIZE
    assert samples[key("hostzero_guest_memory_bytes")] == RAM_BYTES
    assert samples[key("hostzero_guest_allocated_bytes")] == 4096
    assert samples[key("hostzero_front_end_connected")] == 1
    assert samples[key("hostzero_queue_requests_total", queue="inflate")] == 2
    assert samples[key("hostzero_queue_malformed_requests_total", queue="inflate")] == 1
    assert samples[key("hostzero_claimed_zero_bytes_total", queue="inflate")] == 4 * PAGE_SIZE
    assert samples[key("hostzero_feature_negotiated", feature="reporting")] == 1
    assert samples[key("hostzero_vhost_user_errors_total", kind="memory")] == 2


def test_a_device_without_front_end(service: FakeService) -> None:
    service.session = None
    samples = exported(status_of(service))
    assert samples[key("hostzero_front_end_connected")] == 0
    assert samples[key("hostzero_guest_memory_bytes")] == 0


def test_discard_sizes_are_a_histogram(service: FakeService) -> None:
    reporting = service.device.metrics.reporting
    for length in (PAGE_SIZE, PAGE_SIZE, 2 << 20, 2 << 30):
        reporting.discard(length)
    samples = exported(status_of(service))
    buckets = [
        samples[key("hostzero_discard_size_bytes_bucket", queue="reporting", le=str(float(bound)))]
        for bound in DISCARD_SIZE_BOUNDS
    ]
    assert buckets == [2, 2, 2, 3, 3, 3, 3]
    assert samples[key("hostzero_discard_size_bytes_bucket", queue="reporting", le="+Inf")] == 4
    assert samples[key("hostzero_discard_size_bytes_count", queue="reporting")] == 4
    assert samples[key("hostzero_discard_size_bytes_sum", queue="reporting")] == 2 * PAGE_SIZE + (2 << 20) + (
        2 << 30
    )


def test_no_counter_is_left_out(service: FakeService) -> None:
    """Every number of the status has a value of its own, which has to turn up."""
    status = status_of(service)
    next_value = 1000.0
    expected: set[float] = set()

    def number(part: dict[str, Any]) -> None:
        nonlocal next_value
        for name, value in part.items():
            if isinstance(value, dict):
                number(value)
            elif isinstance(value, int):
                next_value += 1
                part[name] = next_value
                expected.add(next_value)

    # Calls and sizes are the histogram's; a queue that drops nothing has no metric for it.
    number(status["metrics"])
    device = status["metrics"]["device"]
    for queue, counters in (each for each in device.items() if isinstance(each[1], dict)):
        expected.discard(counters["discard_calls"])
        unused = ["runs"] if queue != "inflate" else []
        if queue not in {"inflate", "deflate"}:
            unused.append("pfns")
        if queue in {"deflate", "stats"}:
            unused += ["discarded_bytes", "discard_failed", "proven_zero_bytes", "claims"]
            unused += ["claimed_zero_bytes"]
            expected -= {counters["skipped_bytes"][str(reason)] for reason in SkipReason}
        expected -= {counters[name] for name in unused}
    assert expected - set(exported(status).values()) == set()


def test_every_statistic_of_a_guest_is_exported(service: FakeService, guest: Guest) -> None:
    data = b"".join(struct.pack("<HQ", tag, 5000 + tag) for tag in StatTag)
    guest.memory.write(Gpa(BITMAP_AT), data)
    guest.put(QueueRole.STATS, [(BITMAP_AT, len(data))])
    guest.kick(QueueRole.STATS)
    samples = exported(status_of(service))
    assert {5000.0 + tag for tag in StatTag} <= set(samples.values())
    assert samples[key("hostzero_guest_free_bytes")] == 5000 + StatTag.MEMFREE


def test_the_page_lists_every_metric(service: FakeService, guest: Guest) -> None:
    text = DOCS.read_text()
    data = b"".join(struct.pack("<HQ", tag, 1) for tag in StatTag)
    guest.memory.write(Gpa(BITMAP_AT), data)
    guest.put(QueueRole.STATS, [(BITMAP_AT, len(data))])
    guest.kick(QueueRole.STATS)
    for metric in StatusCollector(lambda: status_of(service)).collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert f"`{name}`" in text or "vhost_user_" in name, name


# ------------------------------------------------------------- over HTTP


def test_a_scrape(endpoint: MetricsEndpoint, guest: Guest) -> None:
    assert endpoint.url.startswith("http://127.0.0.1:")
    samples: Samples = {}
    for _ in range(3):
        with urllib.request.urlopen(endpoint.url) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            samples = parse(answer.read().decode())
    assert samples[key("hostzero_driver_running")] == 1
    assert samples[key("hostzero_control_requests_total")] == 5


def test_a_scrape_asks_for_the_statistics_of_the_next(endpoint: MetricsEndpoint, guest: Guest) -> None:
    guest.memory.write(Gpa(BITMAP_AT), struct.pack("<HQ", StatTag.MEMFREE, 77))
    guest.put(QueueRole.STATS, [(BITMAP_AT, 10)])
    guest.kick(QueueRole.STATS)
    with urllib.request.urlopen(endpoint.url) as answer:
        assert parse(answer.read().decode())[key("hostzero_guest_free_bytes")] == 77
    # What asks comes after the status that is the answer, so one more status is sure to see it.
    with urllib.request.urlopen(endpoint.url):
        pass
    assert guest.rings[QueueRole.STATS].returned(), "the buffer was not given back to the guest"


def test_a_device_that_does_not_answer_is_unavailable() -> None:
    def fetch() -> dict[str, Any]:
        raise ControlError("no answer in 10 s")

    with MetricsEndpoint(("127.0.0.1", 0), fetch) as endpoint:
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(endpoint.url)
        with raised.value as answer:
            assert answer.read() == b"no answer in 10 s\n"


def test_a_scraper_that_says_nothing_does_not_keep_the_next_waiting_for_ever(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prometheus._Handler, "timeout", 1.0)
    port = int(endpoint.url.rsplit(":", 1)[1].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)), urllib.request.urlopen(endpoint.url) as answer:
        assert answer.status == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("begun", [b"", b"GET /metrics HTTP/1.1\r\n"], ids=["line", "headers"])
def test_a_scraper_that_never_comes_to_an_end_does_not_keep_the_next_waiting_for_ever(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(prometheus._Handler, "timeout", 1.0)
    port = int(endpoint.url.rsplit(":", 1)[1].split("/")[0])
    enough = threading.Event()

    def talk(slow: socket.socket) -> None:
        with contextlib.suppress(OSError):
            slow.sendall(begun)
            while not enough.wait(0.02):
                slow.sendall(b"a")

    with socket.create_connection(("127.0.0.1", port)) as slow:
        talking = threading.Thread(target=talk, args=[slow])
        talking.start()
        try:
            with urllib.request.urlopen(endpoint.url, timeout=30) as answer:
                assert answer.status == 200
        finally:
            enough.set()
            talking.join()


def test_the_time_of_a_request_is_over_before_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a device that does not answer is a 503, and not a connection that ends."""
    made: list[threading.Timer] = []
    running: list[bool] = []

    class Recorded(threading.Timer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    def fetch() -> dict[str, Any]:
        running.extend(not timer.finished.is_set() for timer in made)
        raise ControlError("no answer in 10 s")

    monkeypatch.setattr(threading, "Timer", Recorded)
    with MetricsEndpoint(("127.0.0.1", 0), fetch) as endpoint:
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(endpoint.url)
        raised.value.close()
    assert running == [False]


def test_a_scraper_that_says_nothing_does_not_keep_the_device_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prometheus._Handler, "timeout", 3600.0)
    endpoint = MetricsEndpoint(("127.0.0.1", 0), dict)
    port = endpoint._server.server_port
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.send(b"GET /metrics HTTP/1.1\r\n")
        closing = threading.Thread(target=endpoint.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()


def test_nothing_is_left_of_a_closed_endpoint() -> None:
    before = threading.active_count()
    with MetricsEndpoint(("127.0.0.1", 0), dict) as endpoint:
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(endpoint.url)


def test_a_port_in_use_is_a_usage_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UsageError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        ):
            MetricsEndpoint(("127.0.0.1", port), dict)
