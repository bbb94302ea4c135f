# SPDX-License-Identifier: GPL-2.0-only
"""An archive that a kernel unpacks as its first root file system: cpio in the "newc" format.

The format is the one of Linux, Documentation/driver-api/early-userspace/buffer-format.rst:
a header of 6 digits of magic and 13 fields of 8 hexadecimal digits, the name with its zero
byte, padding to 4 bytes, the data, padding to 4 bytes; the name ``TRAILER!!!`` ends it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_ALIGN: Final = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or directory.

    Attributes:
        path: relative to the root, without a leading slash.
        mode: type and permissions, as in ``st_mode``.
        data: the contents; empty for a directory.
        device: major and minor number of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """Return a directory that everybody may read."""
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    """Return a regular file that everybody may read."""
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def character_device(path: str, major: int, minor: int) -> Entry:
    """Return the node of a character device."""
    return Entry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive; the same entries give the same bytes (no times, no owners).

    Raises:
        ValueError: a path is absolute, empty or leads out of the root.
    """
    out = bytearray()
    for number, entry in enumerate(entries, start=1):
        parts = entry.path.split("/")
        if not entry.path or any(part in {"", ".", ".."} for part in parts):
            raise ValueError(f"{entry.path!r} is no path inside the archive")
        _append(out, number, entry)
    _append(out, 0, Entry(_TRAILER, 0))
    return bytes(out)


def _append(out: bytearray, inode: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    owner = group = mtime = checksum = 0
    home_major = home_minor = 0  # the device that the file lived on
    major, minor = entry.device
    times_and_owners = (owner, group, links, mtime)
    devices = (home_major, home_minor, major, minor)
    fields = (inode, entry.mode, *times_and_owners, len(entry.data), *devices, len(name), checksum)
    out += _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % _ALIGN)
    out += entry.data
    out += bytes(-len(out) % _ALIGN)
