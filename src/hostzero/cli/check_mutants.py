# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check --mutants``: the searches against mutants of the source, to see their teeth."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hostzero.document import check_output, to_json, write_atomically
from hostzero.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hostzero.check.teeth.outcome import Outcome

_STDOUT: Final = Path("-")


def search_mutants(given: Mapping[str, Any], json_path: Path | None) -> None:
    """Search the chosen mutants and print what became of each.

    Ends with status 1 if one that must be killed was not.

    Args:
        given: the options that were given: fields of `MatrixOptions`, and `markdown`.
        json_path: where the document goes; - is standard output.
    """
    from hostzero.check.teeth.matrix import MatrixOptions, run_matrix
    from hostzero.check.teeth.matrix_show import print_matrix, progress_line, to_markdown
    from hostzero.check.teeth.matrix_show import to_json as matrix_to_json
    from hostzero.render import open_console

    values = dict(given)
    markdown = values.pop("markdown", None)
    for option, path in (("--json", json_path), ("--markdown", markdown)):
        if path is not None and path != _STDOUT:
            check_output(option, path)
    options = MatrixOptions(**values)
    for option, value in (("--seconds", options.seconds), ("--jobs", values.get("jobs", 1))):
        if not value > 0:
            raise UsageError(f"{option} {value:g}: must be above zero")
    if not options.again >= 0:
        raise UsageError(f"--again {options.again:g}: must not be below zero; 0 leaves it out")

    def progress(number: int, total: int, outcome: Outcome) -> None:
        click.echo(progress_line(number, total, outcome), err=True)

    matrix = run_matrix(options, progress)
    if markdown is not None:
        write_atomically(markdown, to_markdown(matrix, dt.date.today().isoformat()).encode())
    if json_path == _STDOUT:
        click.echo(to_json(matrix_to_json(matrix)), nl=False)
    elif json_path is not None:
        write_atomically(json_path, to_json(matrix_to_json(matrix)).encode())
    print_matrix(matrix, open_console(to_stderr=json_path == _STDOUT))
    if not matrix.ok:
        raise click.exceptions.Exit(1)
