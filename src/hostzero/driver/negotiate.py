# SPDX-License-Identifier: GPL-2.0-only
"""The status dance of virtio 1.3, 3.1.1, up to FEATURES_OK, and the reset that ends everything."""

from __future__ import annotations

from hostzero.errors import DriverError, NegotiationError
from hostzero.virtio.features import Feature, names
from hostzero.virtio.transport import Status, Transport


def reset(transport: Transport) -> None:
    """Reset the device; when this returns it holds no buffer and no ring of ours (virtio 1.3, 2.4).

    Raises:
        DriverError: the status does not read as 0 afterwards, so that the device may still
            write to guest memory.
    """
    transport.set_status(0)
    status = transport.status()
    if status != 0:
        raise DriverError(f"the device did not reset: its status reads {status:#x}, not 0 (virtio 1.3, 2.4)")


def begin(transport: Transport) -> int:
    """Reset the device, notice it, and return the features that it offers.

    Raises:
        NegotiationError: the device is of the legacy kind, whose registers this driver does
            not speak (virtio 1.3, 6.1).
        DriverError: the device did not reset.
    """
    reset(transport)
    transport.set_status(Status.ACKNOWLEDGE)
    transport.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
    offered = transport.device_features()
    if not offered & Feature.VERSION_1:
        raise NegotiationError("the device does not offer VERSION_1; legacy devices are not served")
    return offered


def accept(transport: Transport, features: Feature) -> None:
    """Write the features and have the device confirm them.

    Raises:
        NegotiationError: FEATURES_OK does not stick (kernel: -ENODEV).
    """
    transport.set_driver_features(int(features))
    wanted = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    transport.set_status(wanted)
    if not transport.status() & Status.FEATURES_OK:
        raise NegotiationError(f"the device refuses the features {', '.join(names(features))}")


def driver_ok(transport: Transport) -> None:
    """Set the device going (kernel: `virtio_device_ready`)."""
    transport.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
