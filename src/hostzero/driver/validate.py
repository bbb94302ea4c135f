# SPDX-License-Identifier: GPL-2.0-only
"""Which offered features the driver accepts: every rule that clears a bit, as one table.

The kernel splits this between the driver's feature table, `virtballoon_validate()` and the
transport. Here it is one pure function, so that it can be tried over all subsets of bits and
all kinds of guest. `REFUSALS` is the whole policy; `virtballoon_validate` only walks it.

One rule is stricter than the letter of the patch series. A guest that fills freed pages with
a non-zero poison value loses bits 6 and 7 whether or not PAGE_POISON is offered: the host can
only say "zero", and such a guest's free pages are never zero once it has touched them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from hostzero.virtio.features import Feature

PAGE_POISON_VAL: Final = 0xAAAA_AAAA
"""Four bytes of `PAGE_POISON`, which the kernel writes into freed pages (kernel: `poison.h`)."""

DRIVER_FEATURES: Final = (
    Feature.MUST_TELL_HOST
    | Feature.STATS_VQ
    | Feature.DEFLATE_ON_OOM
    | Feature.FREE_PAGE_HINT
    | Feature.PAGE_POISON
    | Feature.REPORTING
    | Feature.DEVICE_INIT_REPORTED
    | Feature.DEVICE_INIT_ON_INFLATE
    | Feature.RING_EVENT_IDX
    | Feature.VERSION_1
)
"""What this driver implements (kernel: the `features` table, and `vring_transport_features`)."""


@dataclass(frozen=True)
class GuestFacts:
    """What the driver must know of its guest before it accepts a feature.

    Attributes:
        init_on_free: the guest zeroes pages when they are freed (``init_on_free=1``).
        page_poisoning: the guest fills freed pages with `PAGE_POISON_VAL` (``page_poison=1``).
        confidential: the guest does not trust its host (kernel: `cc_platform_has`).
    """

    init_on_free: bool = False
    page_poisoning: bool = False
    confidential: bool = False

    @property
    def want_init_on_free(self) -> bool:
        """Whether freed pages are zeroed; poisoning switches it off (kernel: `mm_init.c`)."""
        return self.init_on_free and not self.page_poisoning

    @property
    def fills_freed_pages(self) -> bool:
        """Whether the guest cares what a freed page holds."""
        return self.init_on_free or self.page_poisoning

    @property
    def poison_val(self) -> int:
        """What the driver writes to `poison_val` under PAGE_POISON (kernel: `virtballoon_probe`)."""
        return 0 if self.want_init_on_free else PAGE_POISON_VAL


class Refusal(NamedTuple):
    """One rule: under a condition, some bits are cleared."""

    clears: Feature
    applies: Callable[[Feature, GuestFacts], bool]
    why: str


_BOTH_INIT_BITS: Final = Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE

# In order: a rule sees what the rules above it left. REPORTING must be settled before bit 6.
REFUSALS: Final = (
    Refusal(
        Feature.RING_INDIRECT_DESC,
        lambda _features, _guest: True,
        # Kernel virtballoon_validate(), patch 28.
        "an indirect table is allocated while balloon_lock is held, and the OOM notifier wants that lock",
    ),
    Refusal(
        Feature.ACCESS_PLATFORM,
        lambda _features, _guest: True,
        # Kernel virtballoon_validate(); it is also why the inflate bitmap needs no DMA alignment (patch 36).
        "the balloon passes guest physical addresses, never addresses of an IOMMU",
    ),
    Refusal(
        Feature.PAGE_POISON,
        lambda _features, guest: not guest.fills_freed_pages,
        # Kernel virtballoon_validate().
        "the guest neither poisons nor zeroes freed pages, so there is no poison value to tell",
    ),
    Refusal(
        Feature.REPORTING,
        lambda features, guest: guest.fills_freed_pages and Feature.PAGE_POISON not in features,
        # Kernel virtballoon_validate().
        "the guest relies on what freed pages hold, and without PAGE_POISON the host would not keep it",
    ),
    Refusal(
        Feature.DEVICE_INIT_REPORTED,
        lambda features, _guest: Feature.REPORTING not in features,
        # Patch 31: the bit describes the reporting queue, which is then absent.
        "there is no reporting queue",
    ),
    Refusal(
        _BOTH_INIT_BITS,
        lambda _features, guest: guest.page_poisoning,
        # Patches 31 and 36, since v6 here and not in probe; virtio-spec issues 242 and 244.
        "the poison value is not zero: a device that fills with it initialises pages, but not to zero",
    ),
    Refusal(
        _BOTH_INIT_BITS,
        lambda _features, guest: guest.confidential,
        # Patch 32 for bit 6; the notes of v5 name both features.
        "a confidential guest does not take the host's word for what a page holds",
    ),
)


def virtballoon_validate(offered: int, guest: GuestFacts) -> Feature:
    """Return the features to accept out of those `offered` (kernel: `virtballoon_validate`).

    Bits that the driver does not implement are cleared whatever they are, bits without a
    name included.
    """
    features = Feature(offered) & (DRIVER_FEATURES | Feature.RING_INDIRECT_DESC | Feature.ACCESS_PLATFORM)
    for rule in REFUSALS:
        if rule.applies(features, guest):
            features &= ~rule.clears
    return features


def refused(offered: int, guest: GuestFacts) -> list[tuple[Feature, str]]:
    """Return each known bit that `virtballoon_validate` clears, with the first rule's reason."""
    features = Feature(offered)
    reasons: list[tuple[Feature, str]] = []
    for rule in REFUSALS:
        if rule.applies(features, guest):
            reasons.extend((bit, rule.why) for bit in rule.clears & features)
            features &= ~rule.clears
    return reasons
