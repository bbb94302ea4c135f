# SPDX-License-Identifier: GPL-2.0-only
"""How compiled code is compiled, and where the compiled form is kept.

Everything per page is plain Python over record arrays that Numba compiles. Two
decorators are all there is:

`inline`
    a small function on a hot path; its body is pasted into every caller.
`compiled`
    a function that stays one: the slow paths, and every entry point from Python.

Both drop Numba's reference counting (`_nrt=False`): the arrays outlive every call,
and counting them costs ten times what an order-0 allocation does. The option is
undocumented, as is the hook in `_dispatcher`, which is why the project pins one Numba
release exactly. Without reference counting no array may be created in compiled code,
so none is.

With ``NUMBA_DISABLE_JIT=1`` both decorators return the function as it stands, for a
debugger or for coverage. Integers then keep the width of the record's field, where
compiled code widens to 64 bits: hence records hold 64-bit fields wherever bits are
shifted.

Numba notices an edited function but not an edited callee in another file. The cache
therefore lives in a directory named by a digest of all compiled sources, and an edit
anywhere in them starts a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import llvmlite.binding as llvm
import numba

F = TypeVar("F", bound=Callable[..., Any])

_KEPT: Final = 8  # caches; each edit of a compiled source makes one of about 100 MB
_READY: Final = "ready"
_IN_USE: Final = "in-use"


def _sources() -> list[Path]:
    here = Path(__file__)
    # units.py: its constants are compiled in. No other room holds compiled code.
    return [here, here.with_name("units.py"), *sorted((here.parent / "mm").glob("*.py"))]


def _digest() -> str:
    # Code with bounds checks must not be taken for code without (CONTRIBUTING.md).
    # A home that several machines share must not look warm to another processor.
    flags = f"{numba.config.BOUNDSCHECK} {numba.config.OPT} {llvm.get_host_cpu_name()}"
    # Numba files its entries by the path of the source: a second checkout starts cold.
    where = Path(__file__).resolve().parent
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {flags} {where}".encode())
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _usable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return os.access(directory, os.W_OK)
    except OSError:
        return False


def _cache_root() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(configured) if configured else Path.home() / ".cache"
    except RuntimeError:  # a user without a home directory
        root = Path("/nonexistent")
    root = root / "hostzero"
    # A home that cannot be written (a build user, a read-only image) must not stop the program.
    return root if _usable(root) else Path(tempfile.gettempdir()) / f"hostzero-{os.getuid()}"


def _lock(directory: Path, how: int) -> int:
    """Lock a cache; returns the descriptor that holds the lock."""
    held = os.open(directory / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(held, how | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _forget_if_unused(directory: Path) -> None:
    try:
        held = _lock(directory, fcntl.LOCK_EX)
    except OSError:  # in use, gone by now, or on a file system without locks
        return
    shutil.rmtree(directory, ignore_errors=True)
    os.close(held)


def _forget_old_caches(root: Path, current: Path) -> None:
    current.touch()
    ages = []
    for entry in root.glob("compiled-*"):
        with contextlib.suppress(OSError):
            ages.append((entry.stat().st_mtime, entry))
    for _, entry in sorted(ages, reverse=True)[_KEPT:]:
        _forget_if_unused(entry)


def _set_up_cache() -> Path:
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / f"hostzero-{_digest()}"
    root = _cache_root()
    directory = root / f"compiled-{_digest()}"
    if _usable(directory):
        with contextlib.suppress(OSError):  # without locks nothing is forgotten either
            _lock(directory, fcntl.LOCK_SH)  # held until the process ends
        _forget_old_caches(root, directory)
    return directory


CACHE_DIR: Final = _set_up_cache()
numba.config.CACHE_DIR = str(CACHE_DIR)

COMPILER_ON: Final = not numba.config.DISABLE_JIT


def _dispatcher(function: F, *, forceinline: bool) -> F:
    # forceinline is always given: a function compiled on behalf of a caller inherits the
    # caller's setting otherwise, and everything ends up inside everything.
    dispatcher = numba.njit(cache=True, nogil=True, _nrt=False, forceinline=forceinline)(function)
    if COMPILER_ON:
        typed = dispatcher.get_call_template

        # Numba types a constant argument as that constant and compiles the callee once for
        # each: eight times the code and the compile time. One form with plain integers will do.
        def get_call_template(args: Any, kws: Any) -> Any:
            plain = tuple(numba.types.unliteral(arg) for arg in args)
            return typed(plain, {name: numba.types.unliteral(arg) for name, arg in kws.items()})

        dispatcher.get_call_template = get_call_template
    return dispatcher


def inline(function: F) -> F:
    """Compile a small function into its callers."""
    return _dispatcher(function, forceinline=True)


def compiled(function: F) -> F:
    """Compile a function that stays a function: a slow path or an entry from Python."""
    return _dispatcher(function, forceinline=False)


def is_warm() -> bool:
    """Return whether the compiled form of the current sources is on disk already."""
    return not COMPILER_ON or (CACHE_DIR / _READY).exists()


def mark_warm() -> None:
    """Record that everything has been compiled once and is on disk."""
    if COMPILER_ON and _usable(CACHE_DIR):
        (CACHE_DIR / _READY).touch()
