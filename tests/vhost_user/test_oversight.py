# SPDX-License-Identifier: GPL-2.0-only
"""Control socket and metrics of one backend: both there, both gone, and no end that waits."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hostzero.errors import UsageError
from hostzero.vhost_user.control_client import ControlClient
from hostzero.vhost_user.oversight import oversight
from tests.vhost_user.control_service import FakeService


@pytest.fixture
def selector() -> selectors.DefaultSelector:
    return selectors.DefaultSelector()


def url_in(caplog: pytest.LogCaptureFixture) -> str:
    (line,) = (
        record.getMessage() for record in caplog.records if record.getMessage().startswith("metrics: ")
    )
    return line.removeprefix("metrics: ")


def test_both_are_there_and_both_go(
    service: FakeService,
    selector: selectors.DefaultSelector,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "ctl"
    got: list[object] = []
    with caplog.at_level(logging.INFO), oversight(service, selector, control=path, metrics=("127.0.0.1", 0)):
        url = url_in(caplog)

        def ask() -> None:
            with ControlClient.open(path) as client, urllib.request.urlopen(url) as answer:
                got.extend([client.request("metrics")["control"]["clients"], answer.status])

        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            for key, mask in selector.select(0.01):
                key.data(mask)
        assert got == [2, 200]
    assert not path.exists()
    assert not selector.get_map()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)


def test_nothing_is_opened_that_was_not_asked_for(
    service: FakeService, selector: selectors.DefaultSelector
) -> None:
    threads = threading.active_count()
    with oversight(service, selector):
        assert not selector.get_map()
        assert threading.active_count() == threads


def test_a_scrape_that_waits_for_the_loop_does_not_keep_the_device_from_ending(
    service: FakeService, selector: selectors.DefaultSelector, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop has ended, nobody answers any more, and the scraper hears so."""
    status: list[int] = []
    with caplog.at_level(logging.INFO), oversight(service, selector, metrics=("127.0.0.1", 0)) as server:
        url = url_in(caplog)

        def scrape() -> None:
            try:
                urllib.request.urlopen(url)
            except urllib.error.HTTPError as error:
                status.append(error.code)
                error.close()

        scraping = threading.Thread(target=scrape)
        scraping.start()
        # The request has reached the control socket, and stays there.
        assert selector.select(30)
        server.close()
        scraping.join(30)
    assert status == [503]


def test_an_address_that_others_can_reach_is_worth_a_warning(
    service: FakeService, selector: selectors.DefaultSelector, caplog: pytest.LogCaptureFixture
) -> None:
    with oversight(service, selector, metrics=("0.0.0.0", 0)):
        pass
    assert "served to other machines" in caplog.text


def test_what_was_opened_before_an_error_is_closed(
    service: FakeService, selector: selectors.DefaultSelector, tmp_path: Path
) -> None:
    path = tmp_path / "ctl"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ("127.0.0.1", taken.getsockname()[1])
        with (
            pytest.raises(UsageError, match="cannot listen"),
            oversight(service, selector, control=path, metrics=address),
        ):
            pytest.fail("two listen on one port")
    assert not path.exists()
    assert not selector.get_map()
