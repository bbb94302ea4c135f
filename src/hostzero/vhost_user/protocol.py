# SPDX-License-Identifier: GPL-2.0-only
"""The words of vhost-user: requests and features by their numbers, and what can be wrong.

The source is QEMU's `docs/interop/vhost-user.rst`, whose names are kept. What a request carries is
in `payloads`, how it travels in `messages`.
"""

from __future__ import annotations

import enum
from typing import Final

F_PROTOCOL_FEATURES: Final = 1 << 30
"""`VHOST_USER_F_PROTOCOL_FEATURES`, among the virtio features; a driver never sees it."""


class ErrorKind(enum.StrEnum):
    """What can be wrong with a message, to count by."""

    FRAMING = "framing"
    """The connection cannot go on: version, reply bit, size, or an end in the middle."""
    UNKNOWN = "unknown"
    """A request that is not served here."""
    MALFORMED = "malformed"
    """A payload of the wrong size or with values that cannot be."""
    DESCRIPTORS = "descriptors"
    """Too many, too few, or of the wrong type."""
    ORDER = "order"
    """A request that is not due yet, or not any more."""
    FEATURES = "features"
    """Features that were not offered."""
    MEMORY = "memory"
    """A memory table that cannot be mapped, or addresses outside of it."""
    RING = "ring"
    """A ring that cannot run as it was described."""
    INTERNAL = "internal"
    """A defect of hostzero; the log has it."""


class Request(enum.IntEnum):
    """What a front end asks, under the names of the specification."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34


class BackendRequest(enum.IntEnum):
    """What a backend asks over the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(enum.IntFlag):
    """Protocol features by their bits; a backend offers those it implements."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


def name_of(request: int) -> str:
    """Return a request's name and number, or the number of one that has no name here."""
    return f"{Request(request).name} ({request})" if request in _REQUESTS else str(request)


_REQUESTS: Final[frozenset[int]] = frozenset(Request)
