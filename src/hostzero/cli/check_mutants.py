# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check --mutants``: the searches against mutants of the source, to see their teeth."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import click

from hostzero.cli.output import check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hostzero.check.teeth.outcome import Outcome


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

    values = dict(given)
    markdown = values.pop("markdown", None)
    check_outputs({"--json": json_path, "--markdown": markdown})
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
        write_output(markdown, to_markdown(matrix, dt.date.today().isoformat()))
    write_output(json_path, to_json(matrix_to_json(matrix)))
    print_matrix(matrix, console_beside(json_path, markdown))
    if not matrix.ok:
        raise click.exceptions.Exit(1)
