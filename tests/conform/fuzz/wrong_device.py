# SPDX-License-Identifier: GPL-2.0-only
"""``python -m tests.conform.fuzz.wrong_device DEFECT device ...``: hostzero's device with one defect."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

from hostzero.device.discard import Discarder
from hostzero.device.metrics import QueueMetrics
from hostzero.errors import MessageError
from hostzero.vhost_user.connection import Message
from hostzero.vhost_user.control_commands import Commands
from hostzero.vhost_user.messages import Header
from hostzero.vhost_user.protocol import Request
from hostzero.vhost_user.session import Session

HANDLE: Final = Session.handle
REFUSE: Final = Session.refuse
DISCARD: Final = Discarder.discard
ANSWER: Final = Commands.answer
KNOWN: Final = {int(request) for request in Request}
HOARD: Final[list[Any]] = []


def dies(session: Session, message: Message) -> bytes | None:
    """End the process at a request that it does not know."""
    if message.header.request not in KNOWN:
        os._exit(3)
    return HANDLE(session, message)


def keeps_descriptors(session: Session, message: Message) -> bytes | None:
    """Forget to close what a message brought."""
    if message.header.request == Request.SET_VRING_ERR:
        HOARD.extend(os.dup(fd.fileno()) for fd in message.fds)
    return HANDLE(session, message)


def grows(session: Session, message: Message) -> bytes | None:
    """Keep something of every SET_OWNER."""
    if message.header.request == Request.SET_OWNER:
        HOARD.append(b"x" * (4 << 20))
    return HANDLE(session, message)


def chatters(session: Session, message: Message) -> bytes | None:
    """Log each message at length."""
    sys.stderr.write("x" * 500 + "\n")
    return HANDLE(session, message)


def takes_offence(session: Session, header: Header, error: Exception) -> bytes | None:
    """Refuse everything after the first thing that had to be refused."""
    HOARD.append(error)
    return REFUSE(session, header, error)


def is_offended(session: Session, message: Message) -> bytes | None:
    """Refuse to have queues after that."""
    if HOARD and message.header.request == Request.SET_VRING_NUM:
        return REFUSE(session, message.header, MessageError("order", "no"))
    return HANDLE(session, message)


def drops_nothing(discarder: Discarder, gpa: int, length: int, metrics: QueueMetrics) -> bool:
    """Say that memory was dropped which is as it was."""
    del discarder, gpa, length, metrics
    return True


def drops_more(discarder: Discarder, gpa: int, length: int, metrics: QueueMetrics) -> bool:
    """Drop the page behind, too."""
    DISCARD(discarder, gpa + length, 4096, metrics)
    return DISCARD(discarder, gpa, length, metrics)


def mumbles(commands: Commands, line: bytes) -> bytes:
    """Answer some lines with what is no answer."""
    HOARD.append(None)
    return b"?\n" if len(HOARD) > 20 else ANSWER(commands, line)


DEFECTS: Final[dict[str, tuple[tuple[type, str, Callable[..., Any]], ...]]] = {
    "dies": ((Session, "handle", dies),),
    "keeps descriptors": ((Session, "handle", keeps_descriptors),),
    "grows": ((Session, "handle", grows),),
    "chatters": ((Session, "handle", chatters),),
    "takes offence": ((Session, "refuse", takes_offence), (Session, "handle", is_offended)),
    "drops nothing": ((Discarder, "discard", drops_nothing),),
    "drops more": ((Discarder, "discard", drops_more),),
    "mumbles": ((Commands, "answer", mumbles),),
}


if __name__ == "__main__":
    for owner, name, function in DEFECTS[sys.argv.pop(1)]:
        setattr(owner, name, function)
    from hostzero.cli.main import main

    main()
