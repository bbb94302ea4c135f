# SPDX-License-Identifier: GPL-2.0-only
"""System calls that Python's standard library lacks, typed, with errno as OSError.

Every function here either succeeds or raises OSError with the call's name in front
of the kernel's text. None of them looks at ranges: that is the caller's work, done
before it comes here.

The three mount calls have no wrapper in older C libraries and go through syscall(2).
Their numbers (430 to 432, Linux 5.2) are the same on every architecture but alpha.
"""

from __future__ import annotations

import ctypes
import mmap as _mmap
import os
from typing import Any, Final

MAP_FIXED: Final = 0x10
# Python's mmap module has this name on some versions only.
MAP_NORESERVE: Final = 0x4000

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02

# statfs(2), f_type.
TMPFS_MAGIC: Final = 0x0102_1994
HUGETLBFS_MAGIC: Final = 0x9584_58F6

FSOPEN_CLOEXEC: Final = 1
FSMOUNT_CLOEXEC: Final = 1
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432

_c = ctypes.CDLL(None, use_errno=True)


def _declare(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_c, name)
    function.restype = restype
    function.argtypes = argtypes
    return function


_mmap_fn = _declare(
    "mmap",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_madvise_fn = _declare("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore_fn = _declare("mincore", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_fallocate_fn = _declare(
    "fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
_fstatfs_fn = _declare("fstatfs", ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_syscall_fn = _c.syscall
_syscall_fn.restype = ctypes.c_long

_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def _last_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def map_shared_fixed(address: int, length: int, fd: int, offset: int, *, reserve: bool) -> None:
    """Map a file, shared and writable, over addresses that the caller owns.

    Whatever was mapped at `address` is replaced (MAP_FIXED), so a caller that does
    not own all of `[address, address + length)` destroys somebody's memory.
    `reserve` False adds MAP_NORESERVE; on hugetlb that would turn "the pool is too
    small" from an error here into a SIGBUS at the first touch.

    Raises:
        OSError: mmap(2) failed; the old mapping may be gone.
    """
    flags = _mmap.MAP_SHARED | MAP_FIXED | (0 if reserve else MAP_NORESERVE)
    protection = _mmap.PROT_READ | _mmap.PROT_WRITE
    if _mmap_fn(address, length, protection, flags, fd, offset) == _MAP_FAILED:
        raise _last_error("mmap")


def madvise(address: int, length: int, advice: int) -> None:
    """Call madvise(2), with the interpreter lock released.

    Raises:
        OSError: madvise(2) failed; part of the range may have been worked on.
    """
    if _madvise_fn(address, length, advice):
        raise _last_error("madvise")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a file's bytes and keep its size (fallocate(2), FALLOC_FL_PUNCH_HOLE).

    Raises:
        OSError: fallocate(2) failed; part of the range may have been freed.
    """
    if _fallocate_fn(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        raise _last_error("fallocate")


def mincore(address: int, length: int) -> bytearray:
    """Return one byte per host page, whose bit 0 says whether the page is in memory.

    Raises:
        OSError: mincore(2) failed.
    """
    pages = -(-length // _mmap.PAGESIZE)
    vector = bytearray(pages)
    target = (ctypes.c_char * pages).from_buffer(vector)
    if _mincore_fn(address, length, ctypes.addressof(target)):
        raise _last_error("mincore")
    return vector


def filesystem(fd: int) -> tuple[int, int]:
    """Return the magic number and the block size of an open file's filesystem.

    On hugetlbfs the block size is the size of its huge pages (hugetlbfs_statfs).

    Raises:
        OSError: fstatfs(2) failed.
    """
    # struct statfs is 120 bytes on 64-bit Linux and starts with two longs: f_type, f_bsize.
    words = (ctypes.c_long * 32)()
    if _fstatfs_fn(fd, ctypes.addressof(words)):
        raise _last_error("fstatfs")
    return words[0] & 0xFFFF_FFFF, words[1]


def fsopen(filesystem_name: bytes) -> int:
    """Return a descriptor of a new, unconfigured filesystem (fsopen(2)).

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.2.
    """
    return _syscall("fsopen", _SYS_FSOPEN, filesystem_name, ctypes.c_uint(FSOPEN_CLOEXEC))


def fsconfig_set(fs: int, key: bytes, value: bytes) -> None:
    """Set one mount option of a filesystem being configured (fsconfig(2)).

    Raises:
        OSError: EINVAL for an option that this kernel does not know.
    """
    command = ctypes.c_uint(FSCONFIG_SET_STRING)
    _syscall("fsconfig", _SYS_FSCONFIG, ctypes.c_int(fs), command, key, value, ctypes.c_int(0))


def fsconfig_create(fs: int) -> None:
    """Create the configured filesystem's superblock (fsconfig(2)).

    Raises:
        OSError: the filesystem refused its options.
    """
    command = ctypes.c_uint(FSCONFIG_CMD_CREATE)
    _syscall("fsconfig", _SYS_FSCONFIG, ctypes.c_int(fs), command, None, None, ctypes.c_int(0))


def fsmount(fs: int) -> int:
    """Return a descriptor of a mount that is attached to no directory (fsmount(2)).

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
    cloexec = ctypes.c_uint(FSMOUNT_CLOEXEC)
    return _syscall("fsmount", _SYS_FSMOUNT, ctypes.c_int(fs), cloexec, ctypes.c_uint(attributes))


def _syscall(name: str, number: int, *arguments: Any) -> int:
    result: int = _syscall_fn(ctypes.c_long(number), *arguments)
    if result < 0:
        raise _last_error(name)
    return result
