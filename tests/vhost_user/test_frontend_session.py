# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from hostzero.errors import ConnectionLost, DeviceError, VhostUserError
from hostzero.vhost_user.frontend_session import FrontEndSession, FrontEndState
from hostzero.vhost_user.payloads import U64, Config, VringState
from hostzero.vhost_user.protocol import ProtocolFeature, Request
from tests.vhost_user.scripted_backend import BIT_30, PROTOCOL, Heard, ScriptedBackend

SECONDS = 20.0
"""Long enough for a machine under load; a test that waits this long fails."""


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
def session(backend: ScriptedBackend) -> Iterator[FrontEndSession]:
    session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
    session.greet()
    yield session
    session.close()


def test_greeting_goes_up_to_set_owner(backend: ScriptedBackend, session: FrontEndSession) -> None:
    assert session.state is FrontEndState.READY
    assert backend.requests() == [1, 15, 16, 17, 21, 3]
    assert backend.heard[2].number == PROTOCOL
    # Acknowledgements are wanted from the moment on that both ends know them.
    assert [bool(heard.flags & 8) for heard in backend.heard] == [False, False, False, False, True, True]
    assert session.queues == 5
    assert session.features & BIT_30


def test_only_what_both_have_is_used() -> None:
    with ScriptedBackend(protocol=1 << 9 | 1 << 50) as backend:
        session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
        session.greet()
        assert session.protocol is ProtocolFeature.CONFIG
        assert session.queues == 2
        # SET_OWNER has no answer here; one that has comes behind it.
        session.number(Request.GET_FEATURES)
        assert backend.requests() == [1, 15, 16, 3, 1]
        assert not any(heard.flags & 8 for heard in backend.heard)
        session.close()


@pytest.mark.parametrize(
    ("features", "protocol", "why"),
    [(0x1_00000000, PROTOCOL, "no protocol features"), (BIT_30, PROTOCOL & ~(1 << 9), "no CONFIG")],
)
def test_a_backend_without_a_configuration_space_is_refused(features: int, protocol: int, why: str) -> None:
    with ScriptedBackend(features, protocol) as backend:
        session = FrontEndSession(backend.sock, SECONDS, time.monotonic)
        with pytest.raises(VhostUserError, match=why):
            session.greet()
        session.close()


def test_a_reply_is_parsed(session: FrontEndSession, backend: ScriptedBackend) -> None:
    backend.config[4:8] = b"\1\2\3\4"
    assert session.ask(Request.GET_CONFIG, Config(4, 0, bytes(4))) == Config(4, 0, b"\1\2\3\4")
    assert session.ask(Request.GET_VRING_BASE, VringState(3, 0)) == VringState(3, 7)


def test_a_refusal_is_an_error(session: FrontEndSession, backend: ScriptedBackend) -> None:
    backend.results[2] = 1
    with pytest.raises(DeviceError, match="refuses SET_FEATURES"):
        session.tell(Request.SET_FEATURES, U64(1))
    session.tell(Request.SET_VRING_NUM, VringState(0, 128))


def test_a_configuration_change_is_told_and_answered_if_wanted(
    session: FrontEndSession, backend: ScriptedBackend
) -> None:
    changes = []
    session.config_changes = lambda: changes.append(1)
    backend.say(2)
    backend.say(2, flags=1 | 8)
    backend.say(77, flags=1 | 8)
    for _ in range(3):
        session.serve(session.filenos()[1:])
    assert changes == [1, 1]
    assert backend.channel is not None
    answers = backend.channel.recv(40)
    assert answers == struct.pack("=IIIQ", 2, 5, 8, 0) + struct.pack("=IIIQ", 77, 5, 8, 1)


def test_the_channel_is_served_while_a_reply_is_waited_for(
    session: FrontEndSession, backend: ScriptedBackend
) -> None:
    changes: list[int] = []
    session.config_changes = lambda: changes.append(1)

    def answer(_: Heard) -> bytes:
        # As a backend that waits for the front end before it goes on.
        backend.say(2, flags=1 | 8)
        assert backend.channel is not None
        assert backend.channel.recv(20)
        return struct.pack("=Q", 42)

    backend.answers[1] = answer
    assert session.number(Request.GET_FEATURES) == 42
    assert changes == [1]


def test_a_backend_that_goes_away(session: FrontEndSession, backend: ScriptedBackend) -> None:
    backend.hang_up()
    with pytest.raises(ConnectionLost):
        session.number(Request.GET_FEATURES)


def test_a_reply_to_something_else_ends_the_session(
    session: FrontEndSession, backend: ScriptedBackend
) -> None:
    backend.reply(15, bytes(8))
    with pytest.raises(ConnectionLost, match="is one to GET_PROTOCOL_FEATURES"):
        session.number(Request.GET_QUEUE_NUM)


def test_a_reply_to_nothing_ends_the_session(session: FrontEndSession, backend: ScriptedBackend) -> None:
    backend.reply(1, bytes(8), flags=1)
    with pytest.raises(ConnectionLost, match="a reply to no request"):
        session.serve([session.filenos()[0]])


def test_silence_ends_in_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        session = FrontEndSession(ours, 0.05, time.monotonic)
        with pytest.raises(TimeoutError, match="does not answer GET_FEATURES"):
            session.greet()
        session.close()


def test_notifications_do_not_put_off_the_end_of_a_wait(backend: ScriptedBackend) -> None:
    now = 0.0
    session = FrontEndSession(backend.sock, SECONDS, lambda: now)
    session.greet()
    said = 0

    def say_more() -> None:
        nonlocal now, said
        now += SECONDS / 2
        said += 1
        # After ten times the time that a reply may take there is one after all.
        backend.say(2) if said < 20 else backend.reply(1, bytes(8))

    session.config_changes = say_more
    backend.answers[1] = lambda _: backend.say(2)
    with pytest.raises(TimeoutError, match="does not answer GET_FEATURES"):
        session.number(Request.GET_FEATURES)
    assert said == 2
    session.close()


@pytest.mark.parametrize("channel", [False, True])
def test_a_message_in_pieces_does_not_put_off_the_end_of_a_wait(
    backend: ScriptedBackend, channel: bool
) -> None:
    """Neither a reply of which a part has come, nor a notification."""
    times = iter([0.0, 0.0])
    session = FrontEndSession(backend.sock, SECONDS, lambda: next(times, SECONDS))
    session.protocol = ProtocolFeature.BACKEND_REQ
    session._open_channel()
    part = struct.pack("=III", 1, 5, 8) + b"half"

    def answer(_: Heard) -> None:
        assert backend.channel is not None
        (backend.channel if channel else backend._own).sendall(part[:11])

    backend.answers[1] = answer
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            session.number(Request.GET_FEATURES)
        except TimeoutError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS / 2)
    assert [str(error) for error in failed] == ["the backend does not answer GET_FEATURES (1)"]
    session.close()


def test_a_reply_in_pieces_is_put_together(session: FrontEndSession, backend: ScriptedBackend) -> None:
    whole = struct.pack("=IIIQ", 1, 5, 8, 42)
    session.config_changes = lambda: backend._own.sendall(whole[5:])

    def answer(_: Heard) -> None:
        backend._own.sendall(whole[:5])
        backend.say(2)

    backend.answers[1] = answer
    assert session.number(Request.GET_FEATURES) == 42


def test_a_session_greets_once(session: FrontEndSession) -> None:
    with pytest.raises(VhostUserError, match="is ready and has to be connected"):
        session.greet()


def test_closing_twice_is_fine(session: FrontEndSession) -> None:
    session.close()
    session.close()
    assert session.state is FrontEndState.CLOSED
