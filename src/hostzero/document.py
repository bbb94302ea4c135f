# SPDX-License-Identifier: GPL-2.0-only
"""Files that commands write: refused before the work if they cannot be, never half written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hostzero.errors import HostzeroError, UsageError


def to_json(document: Mapping[str, Any]) -> str:
    """Return a document as text that ends with a newline.

    Raises:
        ValueError: it holds a value that JSON has no word for (NaN, infinity).
    """
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def check_output(option: str, path: Path) -> None:
    """Check that a file could be written at `path`, before an hour is spent on its contents.

    Raises:
        UsageError: the directory is missing or not writable, or `path` is a directory.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a directory")
    parent = path.parent
    if not parent.is_dir():
        raise UsageError(f"{option} {path}: there is no directory {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: the directory {parent} cannot be written to")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in one step: a temporary file beside it, then a rename over it.

    An interrupted or failed write leaves the old file, if any, and nothing else.

    Raises:
        HostzeroError: the file system refused.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise HostzeroError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise HostzeroError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    # mkstemp makes a private file; the result should have the rights of any other new file.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
