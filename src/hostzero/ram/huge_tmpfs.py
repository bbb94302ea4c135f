# SPDX-License-Identifier: GPL-2.0-only
"""An unnamed file on a tmpfs that uses huge pages, without a mount that anyone can see.

Shared memory gets huge pages reliably only from a tmpfs mounted with ``huge=always``:
the default of the internal mount behind memfd is ``never``. fsmount(2) (Linux 5.2)
makes such a mount attached to no directory and in no mount namespace. A file opened
in it with O_TMPFILE has no name; when the last descriptor goes, the file and the
filesystem go with it. Nothing changes for any other process, and an interrupted
program leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from hostzero.errors import BackingUnavailable
from hostzero.ram import libc

_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def open_unnamed_file() -> int:
    """Return a descriptor of an empty unnamed file whose pages are huge where they can be.

    Raises:
        BackingUnavailable: the process may not mount, or the kernel lacks what this
            needs; the text says which.
    """
    if huge_pages_denied():
        raise BackingUnavailable(
            f"tmpfs-huge: huge shared memory is switched off here: write `never` in place of `deny` "
            f"to {_SHMEM_ENABLED}"
        )
    try:
        mount = _mount()
    except OSError as error:
        raise BackingUnavailable(f"tmpfs-huge: {_explain(error)} ({error.strerror})") from error
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def huge_pages_denied(control: Path = _SHMEM_ENABLED) -> bool:
    """Whether the administrator has overruled every mount's huge= option (``deny``)."""
    try:
        return "[deny]" in control.read_text()
    except OSError:
        # A kernel without this file refuses huge=always below, in its own words.
        return False


def _mount() -> int:
    fs = libc.fsopen(b"tmpfs")
    try:
        libc.fsconfig_set(fs, b"huge", b"always")
        # No limit but the file's size. The default is half of the machine's memory, and a
        # limit equal to the file makes a racing huge-page fault fail with SIGBUS.
        libc.fsconfig_set(fs, b"size", b"0")
        libc.fsconfig_set(fs, b"mode", b"0700")
        libc.fsconfig_create(fs)
        return libc.fsmount(fs)
    finally:
        os.close(fs)


def _explain(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "a private tmpfs mount needs CAP_SYS_ADMIN: run as root, or use the anonymous backing"
    if error.errno == errno.ENOSYS:
        return "a private tmpfs mount needs fsopen(2), Linux 5.2 or later: use the anonymous backing"
    if error.errno == errno.EINVAL:
        return "this kernel's tmpfs knows no huge=always: use the anonymous backing"
    return "the private tmpfs mount failed"
