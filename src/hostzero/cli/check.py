# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero check``: options in, a report and a recording out; the work is in `hostzero.check`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hostzero.check.run import LARGEST_SEED, SEARCHES, CheckOptions
from hostzero.cli.output import PATH, STDOUT, check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hostzero.check.run import Report

_DEFAULT: Final = CheckOptions(seed=0)
_OF_MUTANTS: Final = {"again", "patches", "names", "kinds", "jobs", "markdown"}
_NOT_OF_MUTANTS: Final = {"searches", "pages", "depth", "output"}


@click.command(name="check")
@click.option(
    "--seconds",
    type=float,
    metavar="N",
    help="How long the searches search, compiling left out.  "
    f"[default: {_DEFAULT.seconds:g}, and 20 for each mutant]",
)
@click.option(
    "--seed", type=int, metavar="N", help="What they draw from.  [default: another each time; 1 for mutants]"
)
@click.option(
    "--search",
    "searches",
    multiple=True,
    type=click.Choice(list(SEARCHES)),
    help=f"Which search to run; may be given more than once.  [default: {', '.join(SEARCHES)}]",
)
@click.option("--pages", type=int, metavar="N", help="The guest's pages.  [default: each search's own]")
@click.option("--depth", type=int, metavar="N", help="How many steps deep the exhaustive search goes.")
@click.option("--json", "json_path", type=PATH, help="Write the report; - is stdout.")
@click.option(
    "--output",
    type=PATH,
    help="Where to record what was found.  [default: hostzero-check-SEED.json, or a free name like it]",
)
@click.option("--replay", type=PATH, metavar="FILE", help="Run a recording again, and nothing else.")
@click.option("--mutants", is_flag=True, help="Search each mutant of the source instead (from a checkout).")
@click.option("--patch", "patches", type=int, multiple=True, metavar="N", help="Only mutants of this patch.")
@click.option("--name", "names", multiple=True, metavar="TEXT", help="Only mutants with this in their name.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only mutants of this kind.")
@click.option(
    "--again",
    type=float,
    metavar="N",
    help="How long mutants that must be found and were not are searched compiled.  [default: 120]",
)
@click.option("--jobs", type=int, metavar="N", help="Mutants at a time.  [default: one a CPU]")
@click.option("--markdown", type=PATH, help="Write what became of the mutants as a page; - is stdout.")
def command(
    *, mutants: bool, json_path: Path | None, output: Path | None, replay: Path | None, **given: Any
) -> None:
    """Search for one page that is believed zero and is not.

    Four searches share the time: random steps on a small guest's allocator, all interleavings on
    a tiny one, random use of a whole machine, and hostile bytes in the rings. After each step
    every zero claim is compared with the bytes in guest memory. The first violation ends the run:
    it is shrunk, printed and recorded.

    Exit status: 0 nothing found, 1 something found.
    """
    given = {name: value for name, value in given.items() if value not in {None, ()}}
    files = {"json": json_path, "output": output}
    all_given = {name: value for name, value in (given | files).items() if value is not None}
    if replay is not None:
        _refuse("--replay runs a recording as it is", [*all_given, *["mutants"] * mutants])
        _replay(replay)
    elif mutants:
        _refuse("--mutants searches each mutant in the same way", _NOT_OF_MUTANTS & all_given.keys())
        from hostzero.cli.check_mutants import search_mutants

        search_mutants(given, json_path)
    else:
        _refuse("that is for --mutants", _OF_MUTANTS & all_given.keys())
        _search(_options(given), json_path, output)


def _refuse(why: str, names: Iterable[str]) -> None:
    singular = {"searches": "search", "patches": "patch", "names": "name", "kinds": "kind"}
    options = sorted(f"--{singular.get(name, name)}" for name in names)
    if options:
        raise UsageError(f"{why}: leave out {', '.join(options)}")


def _options(given: Mapping[str, Any]) -> CheckOptions:
    values = dict(given)
    values.setdefault("seed", secrets.randbelow(LARGEST_SEED + 1))
    options = CheckOptions(**values)
    options.validate()
    return options


def _search(options: CheckOptions, json_path: Path | None, output: Path | None) -> None:
    if output == STDOUT:
        raise UsageError("--output -: a recording is a file, for --replay to read")
    check_outputs({"--json": json_path, "--output": output})
    if output is not None and output.exists():
        raise UsageError(f"--output {output}: is there already, and recordings are not overwritten")
    from hostzero.check.progress import open_progress
    from hostzero.check.run import run_check
    from hostzero.check.show import print_report

    # First of all, so that it is known however the run ends.
    click.echo(f"seed {options.seed}", err=True)
    with open_progress() as progress:
        report = run_check(options, progress)
    unsaved = None if report.interrupted else _save(report, output, json_path)
    print_report(report, console_beside(json_path))
    if unsaved is not None:
        click.echo(f"hostzero check: {unsaved}", err=True)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.ok:
        raise click.exceptions.Exit(1)


def _save(report: Report, output: Path | None, json_path: Path | None) -> UsageError | None:
    # A recording that cannot be written must not take with it what was found.
    from hostzero.check.run import save_recording

    unsaved = None
    try:
        save_recording(report, output or Path(f"hostzero-check-{report.options.seed}.json"))
    except UsageError as error:
        unsaved = error
    write_output(json_path, to_json(report.to_json()))
    return unsaved


def _replay(path: Path) -> None:
    from hostzero.check.recording import Recording
    from hostzero.check.run import replay
    from hostzero.check.show import print_replay
    from hostzero.render import open_console

    recording = Recording.load(path)
    found = replay(recording)
    print_replay(path, recording, found, open_console(to_stderr=False))
    if found is not None:
        raise click.exceptions.Exit(1)
