# SPDX-License-Identifier: GPL-2.0-only
"""One connection from its beginning to its end, against backends that answer by a script."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from hostzero.conform.fuzz import driver as driver_module
from hostzero.conform.fuzz import endings, wild
from hostzero.conform.fuzz import episode as episode_module
from hostzero.conform.fuzz import peer as peer_module
from hostzero.conform.fuzz.arena import Arena
from hostzero.conform.fuzz.driver import Driver
from hostzero.conform.fuzz.episode import Episode
from hostzero.conform.fuzz.finding import Found, Kind
from hostzero.conform.fuzz.peer import Log
from hostzero.vhost_user.protocol import Request
from tests.conform.fuzz import fakes
from tests.conform.fuzz.fakes import Looks, obliging, open_files, wait_for

COMM = Path("/proc/self/comm")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every driver's queues are served by an honest device until they stop, and not misused."""
    start, stop, close = Driver.start, Driver.stop, Driver.close
    devices = contextlib.ExitStack()

    def start_served(driver: Driver, rng: Random) -> None:
        start(driver, rng)
        devices.enter_context(fakes.device(driver, fakes.honest(driver.arena)))

    def stop_served(driver: Driver) -> None:
        devices.close()
        stop(driver)

    def close_served(driver: Driver) -> None:
        devices.close()
        close(driver)

    monkeypatch.setattr(Driver, "start", start_served)
    monkeypatch.setattr(Driver, "stop", stop_served)
    monkeypatch.setattr(Driver, "close", close_served)
    monkeypatch.setattr(wild, "misbehave", lambda rng, _driver: rng.random())


@contextlib.contextmanager
def at(
    folder: Path, script: fakes.Script = obliging, strict: bool = True
) -> Iterator[tuple[Episode, Log, Looks]]:
    log, watch = Log(), Looks()
    with fakes.backend(folder / "sock", script):
        yield Episode(folder / "sock", None, watch, log, strict), log, watch


def recording(heard: list[tuple[int, bytes]]) -> fakes.Script:
    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        heard.append((request, payload))
        return obliging(request, payload, acknowledged)

    return script


def play(episode: Episode) -> None:
    """Some episodes: with messages only, and with one and with more lives of a driver."""
    for number in range(12):
        episode.run(5, number)


def found(call: Callable[[], None]) -> tuple[Kind, str]:
    with pytest.raises(Found) as caught:
        call()
    return caught.value.kind, str(caught.value)


def test_a_number_of_a_seed_sends_the_same_again(tmp_path: Path, served: None) -> None:
    heard: list[tuple[int, bytes]] = []
    sent = []
    with at(tmp_path, recording(heard)) as (episode, _, _):
        before = open_files()
        for seed, number in ((1, 2), (1, 2), (1, 3), (2, 2)):
            heard.clear()
            episode.run(seed, number)
            wait_for(lambda: open_files() == before)  # what came last is read by then
            sent.append(list(heard))
    assert sent[0] == sent[1]
    assert len({str(each) for each in sent}) == 3


def test_after_each_connection_nothing_is_left_here_or_there(tmp_path: Path, served: None) -> None:
    before = open_files()
    with at(tmp_path) as (episode, log, watch):
        for number in range(12):
            watch.looks.clear()
            episode.run(5, number)
            assert watch.looks[-2:] == ["settled", "fresh status"]
            assert "busy" in watch.looks
    assert log.done["connection"] == 12
    assert log.done["driver"] > 5
    wait_for(lambda: open_files() == before)


def test_what_is_done_and_checked_in_which_order(
    tmp_path: Path, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def spy(owner: object, name: str, letter: str) -> None:
        function = getattr(owner, name)

        def called(*arguments: object) -> object:
            done.append(letter)
            return function(*arguments)

        monkeypatch.setattr(owner, name, called)

    for owner, name, letter in (
        (Driver, "stop", "-"),
        (Driver, "work", "w"),
        (wild, "misbehave", "m"),
        (Arena, "check", "c"),
        (endings, "end", "e"),
        (Looks, "busy", "b"),
        (Looks, "settled", "S"),
        (Looks, "fresh_status", "F"),
    ):
        spy(owner, name, letter)
    lives = set()
    with at(tmp_path) as (episode, _, _):
        for number in range(12):
            done.clear()
            episode.run(5, number)
            order = "".join(done)
            assert re.fullmatch(r"cb(-w+cm+b-c)*eF?b?SF", order), order
            lives.add(order.count("-w"))
    assert lives == {0, 1, 2, 3}


def test_memory_that_changed_is_found_before_the_next_life(
    tmp_path: Path, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = 0

    def check(arena: Arena) -> None:
        nonlocal checked
        checked += 1
        if checked == 3:
            raise Found(Kind.CONTENT, "a page changed")

    monkeypatch.setattr(Arena, "check", check)
    before = open_files()
    with at(tmp_path) as (episode, _, _):
        kind, _ = found(lambda: play(episode))
        assert kind is Kind.CONTENT
    wait_for(lambda: open_files() == before)


# ---------------------------------------------------------------------------- an end by the backend


def ending_at(request_: Request) -> fakes.Script:
    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        if request == request_:
            raise EOFError
        return obliging(request, payload, acknowledged)

    return script


def test_a_session_that_is_ended_is_found(tmp_path: Path, served: None) -> None:
    with at(tmp_path, ending_at(Request.SET_FEATURES)) as (episode, log, _):
        why = "the session was ended, and no message had broken its framing"
        assert found(lambda: play(episode)) == (Kind.ENDED, why)
        assert log.answers["ended"] == 1


def test_a_backend_that_may_end_sessions_is_checked_all_the_same(tmp_path: Path, served: None) -> None:
    with at(tmp_path, ending_at(Request.SET_FEATURES), strict=False) as (episode, log, watch):
        for number in range(6):
            watch.looks.clear()
            episode.run(5, number)
            assert watch.looks[-2:] == ["settled", "fresh status"]
        assert log.answers["ended"] > 0


def test_a_backend_that_has_not_noticed_the_last_end_sends_the_next_one_away(
    tmp_path: Path, served: None
) -> None:
    sent_away = 0

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        nonlocal sent_away
        if sent_away < 3:
            sent_away += 1
            raise EOFError
        return obliging(request, payload, acknowledged)

    with at(tmp_path, script) as (episode, _, _):
        episode.run(1, 2)
    assert sent_away == 3


def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_module, "PATIENCE", 0.05)
    before = open_files()
    with at(tmp_path, ending_at(Request.GET_FEATURES)) as (episode, _, _):
        assert found(lambda: episode.run(1, 2)) == (Kind.ENDED, "no front end is served for 0.05 s")
    wait_for(lambda: open_files() == before)


def test_a_backend_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "PATIENCE", 0.05)
    before = open_files()
    with at(tmp_path, lambda *_: None) as (episode, _, _):
        kind, _ = found(lambda: episode.run(1, 2))
        assert kind is Kind.SILENT
    wait_for(lambda: open_files() == before)


def test_a_ring_that_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "PATIENCE", 0.05)
    before = open_files()
    with at(tmp_path) as (episode, _, _):
        kind, text = found(lambda: play(episode))
        assert kind is Kind.SILENT
        assert "is not answered" in text
    wait_for(lambda: open_files() == before)


# ---------------------------------------------------------------------------- names


def test_a_process_calls_itself_odd_names_and_then_its_own_again(tmp_path: Path, served: None) -> None:
    mine = COMM.read_bytes()
    names: set[bytes] = set()

    def script(request: int, payload: bytes, acknowledged: bool) -> bytes | None:
        names.add(Path(f"/proc/{threading.main_thread().native_id}/comm").read_bytes())
        return obliging(request, payload, acknowledged)

    with at(tmp_path, script) as (episode, _, _):
        for number in range(20):
            episode.run(9, number)
            assert COMM.read_bytes() == mine
    assert mine in names
    assert len(names) > 2
    assert any(name.startswith(b"\xff\xfe") for name in names)
