# SPDX-License-Identifier: GPL-2.0-only
"""The guest's virtio balloon driver (kernel: `drivers/virtio/virtio_balloon.c`).

`VirtioBalloon` is the driver. `virtballoon_validate` is its policy on features, usable alone.
"""

from hostzero.driver.validate import GuestFacts, refused, virtballoon_validate
from hostzero.driver.virtio_balloon import State, VirtioBalloon

__all__ = [
    "VirtioBalloon",
    "State",
    "virtballoon_validate",
    "refused",
    "GuestFacts",
]
