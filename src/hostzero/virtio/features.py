# SPDX-License-Identifier: GPL-2.0-only
"""Feature bits of virtio-balloon, their names, and the queues that they bring.

Bits 0 to 5 are in virtio 1.3, 5.5.3 (kernel: `include/uapi/linux/virtio_balloon.h`). Bits 6
and 7 are in no released specification: their numbers are frozen here as the patch series
"skip redundant zeroing of host-zeroed pages" uses them. Bits 28 and up belong to the ring and
the transport (virtio 1.3, 6).
"""

from __future__ import annotations

import enum
import re

from hostzero.errors import UsageError


class Feature(enum.IntFlag):
    """The feature bits that this house knows, under their kernel names without the prefix."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5
    DEVICE_INIT_REPORTED = 1 << 6
    DEVICE_INIT_ON_INFLATE = 1 << 7
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33


class QueueRole(enum.Enum):
    """What a virtqueue of the balloon carries (virtio 1.3, 5.5.2)."""

    INFLATE = "inflate"
    DEFLATE = "deflate"
    STATS = "stats"
    FREE_PAGE = "free-page"
    REPORTING = "reporting"


_OPTIONAL_QUEUES = (
    (Feature.STATS_VQ, QueueRole.STATS),
    (Feature.FREE_PAGE_HINT, QueueRole.FREE_PAGE),
    (Feature.REPORTING, QueueRole.REPORTING),
)

# Both spellings of a kernel macro's prefix; a user may paste one from a header.
_PREFIX = re.compile(r"^(VIRTIO_BALLOON_F_|VIRTIO_F_|VIRTIO_)")
# virtio_balloon.h says REPORTING, the specification says PAGE_REPORTING: one bit, two names.
_ALIASES = {"PAGE_REPORTING": "REPORTING"}


def queue_roles(acked: Feature) -> tuple[QueueRole, ...]:
    """Return the role of each queue; the position in the tuple is the queue's index.

    Linux numbers the queues densely over the features that were negotiated, whereas virtio
    1.3, 5.5.2 gives fixed numbers. Linux is what runs, so a queue whose feature was not
    acknowledged leaves no gap here.
    """
    optional = tuple(role for feature, role in _OPTIONAL_QUEUES if feature in acked)
    return (QueueRole.INFLATE, QueueRole.DEFLATE, *optional)


def names(features: int) -> list[str]:
    """Return the names of the bits set, lowest first; a bit without a name is ``bit-50``.

    The names are those that `parse_features` reads, as in ``stats-vq``.
    """
    found = []
    for bit in range(features.bit_length()):
        if features >> bit & 1:
            feature = _BY_BIT.get(bit)
            found.append(_dashed(feature) if feature is not None else f"bit-{bit}")
    return found


def parse_features(text: str) -> Feature:
    """Return the features that a list such as ``stats-vq,reporting`` names.

    Case, ``-`` or ``_``, and a kernel prefix such as ``VIRTIO_BALLOON_F_`` make no difference.
    An empty text names no feature.

    Raises:
        UsageError: a word is not the name of a feature; the text lists the known names.
    """
    features = Feature(0)
    for word in filter(None, (part.strip() for part in text.split(","))):
        name = _PREFIX.sub("", word.upper().replace("-", "_"))
        feature = Feature.__members__.get(_ALIASES.get(name, name))
        if feature is None:
            known = ", ".join(_dashed(member) for member in Feature)
            raise UsageError(f"{word!r} is not a feature; known are {known}")
        features |= feature
    return features


def adjust_features(text: str, default: Feature) -> Feature:
    """Return the features that a text names, or `default` with the changes that it names.

    ``stats-vq,reporting`` is a list as `parse_features` reads it; ``+page-poison,-stats-vq`` adds
    to the default and takes away from it, in the order of the words.

    Raises:
        UsageError: a word is not the name of a feature, or some words have a sign and some not.
    """
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    signed = [word[0] in "+-" for word in words]
    if not any(signed):
        return parse_features(text)
    if not all(signed):
        raise UsageError(f"{text!r} mixes names with and without a sign: write + or - before all or none")
    features = default
    for word in words:
        named = parse_features(word[1:])
        features = features | named if word[0] == "+" else features & ~named
    return features


def _dashed(feature: Feature) -> str:
    name = feature.name
    assert name is not None, "a single named bit"
    return name.lower().replace("_", "-")


_BY_BIT = {member.bit_length() - 1: member for member in Feature}
