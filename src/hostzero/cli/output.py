# SPDX-License-Identifier: GPL-2.0-only
"""Where commands write their documents: a file, or standard output for ``-``, and the tables beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hostzero.document import check_output, write_atomically
from hostzero.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

STDOUT: Final = Path("-")
PATH: Final = click.Path(path_type=Path)


def check_outputs(paths: Mapping[str, Path | None]) -> None:
    """Check where documents are to go, before an hour is spent on their contents.

    Args:
        paths: by option; None for an option that was not given.

    Raises:
        UsageError: a file could not be written, or two documents would go to standard output.
    """
    given = {option: path for option, path in paths.items() if path is not None}
    piped = [option for option, path in given.items() if path == STDOUT]
    if len(piped) > 1:
        raise UsageError(f"{' and '.join(piped)}: only one of them may be -, which is standard output")
    for option, path in given.items():
        if path != STDOUT:
            check_output(option, path)


def write_output(path: Path | None, content: str | bytes) -> None:
    """Write a document to a file or to standard output; nowhere for None.

    Raises:
        HostzeroError: the file system refused.
    """
    if path == STDOUT:
        click.echo(content, nl=False)
    elif path is not None:
        write_atomically(path, content.encode() if isinstance(content, str) else content)


def console_beside(*paths: Path | None) -> Console:
    """Return what tables are printed on, so that they do not mix with a document on standard output."""
    from hostzero.render import open_console

    return open_console(to_stderr=STDOUT in paths)
