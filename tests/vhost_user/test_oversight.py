# SPDX-License-Identifier: GPL-2.0-only
"""Control socket and metrics of one backend: both there, both gone, and no end that waits."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostzero.errors import UsageError
from hostzero.vhost_user import prometheus
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.oversight import oversee, parse_address
from tests.vhost_user.control_service import FakeService

FREE = ("127.0.0.1", 0)


def url_in(caplog: pytest.LogCaptureFixture) -> str:
    found = [record.getMessage() for record in caplog.records if record.msg.startswith("metrics: ")]
    return found[0].removeprefix("metrics: ") if found else ""


@contextlib.asynccontextmanager
async def overseen(
    caplog: pytest.LogCaptureFixture, service: FakeService, path: Path | None, address: tuple[str, int]
) -> AsyncIterator[str]:
    """Give the address of the metrics once all is open; cancel the oversight at the end."""
    with caplog.at_level(logging.INFO):
        task = asyncio.ensure_future(oversee(service, control=path, metrics=address))
        while not url_in(caplog):
            assert not task.done(), task.exception()
            await asyncio.sleep(0)
        yield url_in(caplog)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_both_are_there_and_both_go(
    service: FakeService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ctl"
    got: list[object] = []

    def ask() -> None:
        with ControlClient.open(path) as client, urllib.request.urlopen(url_in(caplog)) as answer:
            got.extend([client.request("metrics")["control"]["clients"], answer.status])
        got.append(stat.S_IMODE(path.lstat().st_mode))

    async def main() -> None:
        async with overseen(caplog, service, path, FREE):
            await asyncio.to_thread(ask)

    asyncio.run(main())
    assert got == [2, 200, 0o600]
    assert not path.exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url_in(caplog))


@pytest.mark.parametrize("chosen", [False, True], ids=["named", "chosen"])
def test_a_port_that_nobody_named_is_told(
    chosen: bool, service: FakeService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    address = (FREE[0], 0 if chosen else 9100)
    # Somebody may have the port that is named here.
    real = prometheus.MetricsEndpoint
    monkeypatch.setattr(prometheus, "MetricsEndpoint", lambda _, scrape: real(FREE, scrape))

    async def main() -> None:
        with caplog.at_level(logging.INFO):
            task = asyncio.ensure_future(oversee(service, metrics=address, tell=told.append))
            while not (told or url_in(caplog)):
                assert not task.done(), task.exception()
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert bool(told) == chosen
    assert all(line.startswith("metrics: http://127.0.0.1:") for line in told)
    assert bool(url_in(caplog)) != chosen


def test_nothing_is_opened_that_was_not_asked_for(service: FakeService) -> None:
    threads = threading.active_count()

    async def look() -> None:
        task = asyncio.ensure_future(oversee(service))
        await asyncio.sleep(0)
        assert threading.active_count() == threads
        task.cancel()

    asyncio.run(look())


def test_a_scrape_that_waits_for_the_device_does_not_keep_it_from_ending(
    service: FakeService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is busy when the scrape comes, and told to end when it is busy no more."""
    asked = threading.Event()
    failed: list[Exception] = []

    def scrape(client: ControlClient) -> prometheus.Status:
        asked.set()
        return client.request("status")

    def pull(url: str) -> None:
        try:
            urllib.request.urlopen(url)
        except urllib.error.HTTPError as error:
            failed.append(error)
            error.close()
        except (OSError, http.client.HTTPException) as error:
            failed.append(error)

    async def main() -> None:
        async with overseen(caplog, service, None, FREE) as url:
            scraping = threading.Thread(target=pull, args=(url,))
            scraping.start()
            # Nothing else runs in the loop meanwhile.
            assert asked.wait(30)
        await asyncio.to_thread(scraping.join, 30)
        assert not scraping.is_alive()

    monkeypatch.setattr(prometheus, "scrape", scrape)
    asyncio.run(main())
    assert failed


def test_an_address_that_others_can_reach_is_worth_a_warning(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with overseen(caplog, service, None, ("0.0.0.0", 0)):
            pass

    asyncio.run(main())
    assert "served to other machines" in caplog.text


def test_what_was_opened_before_an_error_is_closed(service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    with socket.create_server(FREE) as taken:
        address = ("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UsageError, match="cannot listen"):
            asyncio.run(oversee(service, control=path, metrics=address))
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        (":9100", ("127.0.0.1", 9100)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", ":", "localhost:9100", "127.0.0.1", "127.0.0.1:", "1:65536", "::1", "1:²"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=f"--metrics {text.replace('.', '[.]')}"):
        parse_address(text)
