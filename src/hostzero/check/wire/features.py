# SPDX-License-Identifier: GPL-2.0-only
"""Which features a balloon driver must and must not accept, read from the series a second time.

Sources: `virtballoon_validate` of Linux 7.2, patches 28, 31, 32 and 36, virtio-spec issues 242 and 244.
A driver that accepts too much makes an honest device promise what the guest must not rely on; one that
accepts too little loses what the series is for.
"""

from __future__ import annotations

from hostzero.check.violation import Kind
from hostzero.check.wire.device_model import INIT_ON_INFLATE, INIT_REPORTED, PAGE_POISON, REPORTING
from hostzero.mm import MmConfig

INDIRECT_DESC, ACCESS_PLATFORM = 1 << 28, 1 << 33


def wrong_feature(offered: int, accepted: int, guest: MmConfig) -> tuple[Kind, str] | None:
    """Return the kind of violation and what is wrong with a driver's choice, or None.

    Args:
        offered: what the device offers.
        accepted: what the driver wrote back.
        guest: how the guest kernel was booted.
    """
    fills = guest.page_poisoning or guest.init_on_free
    believes = not guest.page_poisoning and not guest.confidential
    if accepted & ~offered:
        return "rot", "the driver accepts a feature that was not offered"
    if accepted & (INDIRECT_DESC | ACCESS_PLATFORM):
        return "rot", "the driver accepts a feature that a balloon cannot use"
    if accepted & PAGE_POISON and not fills:
        return "rot", "the driver agrees on a poison value that its guest does not have"
    if accepted & REPORTING and fills and not accepted & PAGE_POISON:
        return "corruption", "free pages are reported to a host that does not know what they must hold"
    if accepted & INIT_REPORTED and not accepted & REPORTING:
        return "rot", "the driver wants to hear of reported pages and reports none"
    if accepted & (INIT_REPORTED | INIT_ON_INFLATE) and not believes:
        return "corruption", "the driver asks for zeros where its guest must not believe in them"
    wanted = offered & (INIT_ON_INFLATE | REPORTING)
    if fills and not accepted & PAGE_POISON:
        wanted &= ~REPORTING
    if accepted & REPORTING:
        wanted |= offered & INIT_REPORTED
    if not believes:
        wanted &= ~(INIT_REPORTED | INIT_ON_INFLATE)
    if wanted & ~accepted:
        return "lost", "the driver refuses a feature that its guest could use"
    return None
