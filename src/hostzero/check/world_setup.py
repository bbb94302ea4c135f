# SPDX-License-Identifier: GPL-2.0-only
"""How a machine of the search is made: a few choices, which fit into a recording."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hostzero.device import DeviceConfig
from hostzero.errors import UsageError
from hostzero.machine import Machine
from hostzero.mm import MmConfig
from hostzero.mm.mmzone import ZoneSpec
from hostzero.ram import Ram, libc, open_ram
from hostzero.units import PAGE_SIZE
from hostzero.virtio.features import Feature, QueueRole

Rest = tuple[NDArray[np.uint8], ...]

MIB: Final = 1 << 20
DIRT: Final = 0x5A
PART: Final = "part of a file"
FILES: Final = ("memfd", PART)
"""What the host backs page by page; of other memory it may make huge pages."""
HEAD: Final = (1 << 20) + 3 * PAGE_SIZE
"""Where guest memory begins in a file that has more in it."""
TAIL: Final = 5 * PAGE_SIZE
REST: Final = 0xD7
"""What the rest of that file holds."""
GIGANTIC: Final = 11

CHOICES: Final[dict[str, tuple[Any, ...]]] = {
    "mib": (4, 8, 8, 16, 16, 32),
    "backing": ("anonymous", "anonymous", "memfd", "part of a file"),
    "nr_cpus": (1, 1, 2),
    "two_nodes": (False, False, True),
    "cma": (False, False, True),
    "gigantic": (False, False, False, False, True),
    "thp": ("always", "always", "madvise", "never"),
    "anon_orders": ((), (), (2, 4, 8), (3,)),
    "swap_pages": (0, 64, 1024),
    "init_on_alloc": (False, False, False, True),
    "init_on_free": (False, False, False, True),
    "page_poisoning": (False, False, False, True),
    "debug_vm": (True, False),
    "confidential": (False, False, False, False, False, False, False, True),
    "dcache_aliasing": (False, True),
    "icache_aliasing": (False, False, False, False, True),
    "user_zeroing": ("allocator", "allocator", "allocator", "allocator", "allocator", "caller"),
    "placement": ("linux", "linux", "zero-aware"),
    # entries of the reporting ring, and the smallest order that is reported
    "reporting": ((4, 6), (2, 9), (1, 9), (8, 5), (32, 3), (4, 8), (16, 0)),
    "features": (0, 0, 0, 0, 1, 2, 3, 4, 5, 6),
}
"""What each part of a setup may be; repeated ones are taken more often."""

_BASE: Final = Feature.VERSION_1 | Feature.STATS_VQ | Feature.RING_EVENT_IDX
_BOTH: Final = Feature.REPORTING | Feature.DEVICE_INIT_REPORTED | Feature.DEVICE_INIT_ON_INFLATE
FEATURES: Final = (
    _BASE | _BOTH | Feature.PAGE_POISON | Feature.DEFLATE_ON_OOM,
    _BASE | _BOTH | Feature.FREE_PAGE_HINT | Feature.MUST_TELL_HOST,
    _BASE | Feature.REPORTING | Feature.DEVICE_INIT_REPORTED | Feature.PAGE_POISON,
    _BASE | Feature.DEVICE_INIT_ON_INFLATE | Feature.MUST_TELL_HOST,
    _BASE | Feature.REPORTING | Feature.PAGE_POISON | Feature.DEVICE_INIT_ON_INFLATE,
    _BASE | Feature.REPORTING | Feature.DEFLATE_ON_OOM | Feature.FREE_PAGE_HINT,
    _BASE | _BOTH | Feature.DEFLATE_ON_OOM | Feature.FREE_PAGE_HINT,
)
"""What devices offer."""


def plain_setup(**other: Any) -> dict[str, Any]:
    """Return the first choice of everything, but for what is given."""
    return {name: choices[0] for name, choices in CHOICES.items()} | other


def checked(setup: dict[str, Any]) -> dict[str, Any]:
    """Return a setup with its lists as tuples again.

    Raises:
        UsageError: it is no setup of this search.
    """
    turned = {name: tuple(value) if isinstance(value, list) else value for name, value in setup.items()}
    if turned.keys() != CHOICES.keys() or any(turned[name] not in CHOICES[name] for name in CHOICES):
        raise UsageError("the recording's setup is none of the search `machine`")
    return turned


def device_config(features: int, setup: dict[str, Any]) -> DeviceConfig:
    """Return a device that offers one of `FEATURES`."""
    return DeviceConfig(features=FEATURES[features], queue_sizes={QueueRole.REPORTING: setup["reporting"][0]})


def mm_config(setup: dict[str, Any]) -> MmConfig:
    """Return how the guest kernel is built."""
    pages = setup["mib"] * MIB // PAGE_SIZE
    zones = (ZoneSpec("Normal", 0, pages // 2, 0), ZoneSpec("Normal", pages // 2, pages, 1))
    cma = 0
    if setup["cma"] and (setup["mib"] > 4 or not setup["two_nodes"]):
        cma = 512 if setup["mib"] < 32 else 2560
    return MmConfig(
        zones=zones if setup["two_nodes"] else (),
        cma_pages=cma,
        gigantic_order=GIGANTIC if setup["gigantic"] and setup["mib"] >= 16 else 0,
        swap_size=setup["swap_pages"] * PAGE_SIZE,
        nr_cpus=setup["nr_cpus"],
        thp=setup["thp"],
        anon_orders=setup["anon_orders"],
        init_on_alloc=setup["init_on_alloc"],
        init_on_free=setup["init_on_free"],
        page_poisoning=setup["page_poisoning"],
        debug_vm=setup["debug_vm"],
        confidential=setup["confidential"],
        dcache_aliasing=setup["dcache_aliasing"],
        icache_aliasing=setup["icache_aliasing"],
        user_zeroing=setup["user_zeroing"],
        placement=setup["placement"],
    )


def open_part(size: int) -> tuple[Ram, Rest]:
    """Return memory that is a part of a file, as a peer shares it, and what else the file holds."""
    fd = os.memfd_create("hostzero-check", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, HEAD + size + TAIL)
        whole = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)
        rest = whole[:HEAD], whole[HEAD + size :]
        for part in rest:
            part[:] = REST
        return Ram.from_fd(fd, HEAD, size), rest
    finally:
        os.close(fd)


def boot(setup: dict[str, Any]) -> tuple[Ram, Machine, Rest]:
    """Boot a machine on memory full of dirt; return it with what is beside its memory in the same file."""
    size = setup["mib"] * MIB
    ram, rest = open_part(size) if setup["backing"] == PART else (open_ram(size, setup["backing"]), ())
    if setup["backing"] in FILES:
        # What is known to be absent is looked at page by page, also where this host has huge pages for files.
        with suppress(OSError):  # a kernel without huge pages has no such advice
            libc.madvise(ram.array(np.uint8).ctypes.data, size, mmap.MADV_NOHUGEPAGE)
    ram.array(np.uint8)[:] = DIRT
    machine = Machine(ram=ram, device=device_config(setup["features"], setup), mm=mm_config(setup))
    machine.mm.page_reporting.order = setup["reporting"][1]
    return ram, machine, rest
