# SPDX-License-Identifier: GPL-2.0-only
"""What is done to a guest, again and again: dirty memory, free it, wait for the host to get it back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from hostzero.errors import VmError
from hostzero.units import PAGE_SIZE
from hostzero.vm.guest import Guest
from hostzero.vm.rest import Look, rests
from hostzero.vm.wait import wait_for

MIB: Final = 1 << 20
SLACK: Final = 48 * MIB
"""Memory that may stay backed when all has been reported: pieces below 2 MiB, the guest's own."""

RESIZED_SECONDS: Final = 300.0
COUNTED_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 0.25
"""Between two questions to a device: its answer costs the CPU time that is being watched."""


def marked_page(mark: str) -> bytes:
    """Return a page that is full of `mark`, which has no newline: 64 lines of 63 characters."""
    line = f"{mark:<63.63}\n".encode()
    return line * (PAGE_SIZE // len(line))


def write_marked(guest: Guest, path: str, mark: str, size: int) -> None:
    """Have the guest write a file of `size` bytes, a multiple of 1 MiB, whose pages all are `marked_page`."""
    guest.agent.run(write_command(path, mark, size), 300)


def write_command(path: str, mark: str, size: int) -> str:
    """Return the shell command for `write_marked`: copies of 1 MiB are the fastest that busybox has."""
    make = f"yes '{mark:<63.63}' | head -c {MIB} > /run/marked"
    return f"{make}; for i in $(seq {size // MIB}); do cat /run/marked; done > {path} && rm /run/marked"


def write_random(guest: Guest, path: str, size: int) -> str:
    """Have the guest write a file of random bytes; returns its checksum."""
    guest.agent.run(f"dd if=/dev/urandom of={path} bs=1M count={size // MIB} 2>&1", 300)
    return checksum(guest, path)


def checksum(guest: Guest, path: str) -> str:
    """Return the checksum of a file in the guest."""
    return guest.agent.read(f"sha1sum {path}", 300).split()[0]


def dirty_and_free(guest: Guest, size: int) -> None:
    """Have a process in the guest write to `size` bytes of its own memory, and end."""
    guest.agent.run(f"dd if=/dev/zero of=/dev/null bs={size} count=1 iflag=fullblock 2>&1", 300)


class Balloon(Protocol):
    """A balloon as a host steers it: hostzero's over its control socket, QEMU's over QMP."""

    def resize(self, balloon_bytes: int) -> None:
        """Ask the guest for a balloon of this size; returns at once."""

    def actual(self) -> int:
        """Return the balloon's size, in bytes, as the guest says."""
        ...


def resize(
    balloon: Balloon, target: int, seconds: float = RESIZED_SECONDS, look: Callable[[], None] = lambda: None
) -> None:
    """Ask for a balloon of `target` bytes and wait until the guest says that it is there.

    Raises:
        VmError: it is not after `seconds`.
    """
    balloon.resize(target)

    def there() -> bool:
        look()
        return balloon.actual() == target

    wait_for(there, f"a balloon of {target // MIB} MiB", seconds, LOOK_SECONDS)


def wait_balloon_pages(guest: Guest, pages: int, seconds: float = COUNTED_SECONDS) -> None:
    """Wait until the guest's kernel counts exactly `pages` pages inside balloons.

    Compaction in the guest moves them, and a page that is being moved counts twice for as long as the
    driver waits for the device (Linux, balloon_page_migrate).

    Raises:
        VmError: it counts others after `seconds`; the text says how many.
    """
    try:
        wait_for(lambda: guest.balloon_pages() == pages, f"{pages} pages in the balloon", seconds)
    except VmError as error:
        raise VmError(f"{error}: the guest counts {guest.balloon_pages()}") from error


def wait_backed_below(
    guest: Guest, limit: int, seconds: float, look: Callable[[], None] = lambda: None
) -> int:
    """Wait until at most `limit` bytes of guest memory are backed; returns how many are.

    Raises:
        VmError: they are more after `seconds`; the text says how many.
    """

    def below() -> int:
        look()
        backed = guest.memory.backed()
        return backed if backed <= limit else 0

    try:
        return wait_for(below, "memory comes back", seconds)
    except VmError as error:
        now = guest.memory.backed()
        raise VmError(f"{error}: {now // MIB} MiB are backed, not {limit // MIB}") from error


def settle(
    guest: Guest,
    busy: Callable[[], float],
    quiet: float = 3.0,
    seconds: float = 120.0,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Wait until nothing has been given back, and the device has done nothing, for `quiet` seconds.

    Args:
        guest: the guest.
        busy: CPU seconds that the device has used so far.
        quiet: how long; longer than the 2 s after which a guest reports.
        seconds: how long to wait for that.
        look: called all the while; what it makes the device do must be next to nothing.
    """
    looks: list[Look] = []

    def rested() -> bool:
        look()
        looks.append(Look(time.monotonic(), busy(), guest.memory.backed()))
        return rests(looks, quiet)

    wait_for(rested, "the guest comes to rest", seconds, interval=0.1)
