# SPDX-License-Identifier: GPL-2.0-only
"""How compiled code is compiled, and where the compiled form is kept.

Everything per page is plain Python over record arrays that Numba compiles. Three
decorators are all there is:

`inline`
    a small function on a hot path; its body is pasted into every caller.
`compiled`
    a function that stays one: the slow paths, and every entry point from Python.
`far`
    a `compiled` function that its callers reach through a table of addresses.

Numba links everything that a function calls, and what that calls, into the function and
optimises it all anew: with the slow path of an allocation behind every fault, the compile
time is the number of functions times the size of the allocator. A `far` function ends that.
It costs a caller some tens of nanoseconds, so it is for what runs once a batch, once a huge
page or hardly ever.

All drop Numba's reference counting (`_nrt=False`): the arrays outlive every call,
and counting them costs ten times what an order-0 allocation does. The option is
undocumented, as are the hooks in `_dispatcher` and `far`, which is why the project pins one
Numba release exactly. Without reference counting no array may be created in compiled code,
so none is.

With ``NUMBA_DISABLE_JIT=1`` the decorators return the function as it stands, for a
debugger or for coverage. Integers of a record are then Python's own (`mm.records`), those of
other arrays keep their width, where compiled code widens to 64 bits: hence 64-bit fields
wherever bits are shifted.

Numba notices an edited function but not an edited callee in another file. The cache
therefore lives in a directory named by a digest of all compiled sources, and an edit
anywhere in them starts a new one. A room above `mm` with compiled code has a directory
inside that, named by a digest of its own sources.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import inspect
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import llvmlite.binding as llvm
import numba
import numba.core.cgutils

from hostzero.errors import VmBug

F = TypeVar("F", bound=Callable[..., Any])

_KEPT: Final = 8  # caches; each edit of a compiled source makes one of about 100 MB
_READY: Final = "ready"
_IN_USE: Final = "in-use"


def _sources() -> list[Path]:
    here = Path(__file__)
    # units.py: its constants are compiled in. Rooms above have directories of their own inside.
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
    # With the compiler off nothing is kept, and nobody else's cache has to make room.
    if not numba.config.DISABLE_JIT and _usable(directory):
        with contextlib.suppress(OSError):  # without locks nothing is forgotten either
            _lock(directory, fcntl.LOCK_SH)  # held until the process ends
        _forget_old_caches(root, directory)
    return directory


CACHE_DIR: Final = _set_up_cache()

COMPILER_ON: Final = not numba.config.DISABLE_JIT


@functools.cache
def _directory_of(room: str) -> Path:
    """Return where compiled code of a room is kept: what is above `mm` has no part in its digest."""
    if room in {"mm", "jit"} or not (sources := sorted((Path(__file__).parent / room).rglob("*.py"))):
        return CACHE_DIR
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return CACHE_DIR / f"{room}-{digest.hexdigest()[:16]}"


def _dispatcher(function: F, *, forceinline: bool) -> F:
    room = function.__module__.removeprefix("hostzero.").partition(".")[0]
    numba.config.CACHE_DIR = str(_directory_of(room))  # read once, when the next line makes the cache
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


FAR_SLOTS: Final = 4096
_KINDS: Final = {"int": numba.types.int64, "bool": numba.types.boolean}
_far: dict[int, Any] = {}  # dispatcher by slot


def far(function: F) -> F:
    """Compile a function that callers reach through `mem.far`, the table that `link` fills.

    Its first argument is the bundle of arrays, the others are integers or, if annotated so,
    booleans; their types are fixed by that. One that is annotated as anything else is another bundle,
    which `link` must be given.
    """
    dispatcher: Any = _dispatcher(function, forceinline=False)
    if not COMPILER_ON:
        return cast("F", dispatcher)
    # The number must be the same in each process, whatever is imported first: it is compiled in.
    slot = zlib.crc32(f"{function.__module__}.{function.__qualname__}".encode()) % FAR_SLOTS
    if slot in _far:
        raise AssertionError(f"{function.__qualname__} and another far function share a slot: rename one")
    _far[slot] = dispatcher
    annotations = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
    kinds = [_KINDS.get(annotation, annotation) for annotation in annotations[1:]]
    typed = dispatcher.get_call_template

    def get_call_template(args: Any, _: Any) -> Any:
        # A bundle's type is known from the call.
        others = zip(kinds, args[1:], strict=True)
        fixed = (args[0], *(arg if isinstance(kind, str) else kind for kind, arg in others))
        template = typed(fixed, {})
        overload = dispatcher.overloads[fixed]
        # The implementation that was registered last for a signature is the one that is used.
        caller = _far_call(overload.fndesc, slot)
        dispatcher.targetctx._defns[overload.entry_point].append(caller, caller.signature)
        return template

    dispatcher.get_call_template = get_call_template
    dispatcher.far_types = tuple(kinds)
    return cast("F", dispatcher)


def _far_call(fndesc: Any, slot: int) -> Any:
    # As numba.core.imputils.user_function, but the callee is an address and no library is linked.
    def implementation(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bundle = signature.args[0]
        index = bundle.fields.index("far")
        table = context.make_array(bundle.types[index])(
            context, builder, value=builder.extract_value(args[0], index)
        )
        address = builder.load(builder.gep(table.data, [context.get_constant(numba.types.intp, slot)]))
        with numba.core.cgutils.if_unlikely(builder, builder.icmp_unsigned("==", address, address.type(0))):
            context.call_conv.return_user_exc(builder, VmBug, ("a far function was not linked at boot",))
        kind = context.call_conv.get_function_type(fndesc.restype, fndesc.argtypes)
        callee = builder.inttoptr(address, kind.as_pointer())
        status, result = context.call_conv.call_function(
            builder, callee, fndesc.restype, fndesc.argtypes, args
        )
        with numba.core.cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    implementation.signature = fndesc.argtypes  # type: ignore[attr-defined]
    implementation.libs = ()  # type: ignore[attr-defined]
    return implementation


def link(bundle: Any, **others: Any) -> None:
    """Compile or load every far function that has been imported, and enter it into `bundle.far`.

    Functions that take another bundle are left out unless it is given here, by the name of its type.
    """
    if not COMPILER_ON:
        return
    kind = numba.typeof(bundle)
    given = {name: numba.typeof(other) for name, other in others.items()}
    for slot, dispatcher in _far.items():
        types = (kind, *(given.get(other, other) for other in dispatcher.far_types))
        if bundle.far[slot] or any(isinstance(other, str) for other in types):
            continue
        if types not in dispatcher.overloads:
            dispatcher.compile(types)
        overload = dispatcher.overloads[types]
        bundle.far[slot] = overload.library.get_pointer_to_function(overload.fndesc.llvm_func_name)


def is_warm() -> bool:
    """Return whether the compiled form of the current sources is on disk already."""
    return not COMPILER_ON or (CACHE_DIR / _READY).exists()


def mark_warm() -> None:
    """Record that everything has been compiled once and is on disk."""
    if COMPILER_ON and _usable(CACHE_DIR):
        (CACHE_DIR / _READY).touch()
