# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero fuzz``: options in, a report out; the work is in `hostzero.conform.fuzz`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

import click

from hostzero.cli.output import PATH, check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.errors import UsageError

LARGEST_SEED: Final = (1 << 32) - 1


@click.command(name="fuzz")
@click.argument("target")
@click.option("--seconds", type=float, default=60.0, show_default=True, metavar="N", help="How long.")
@click.option(
    "--seed", type=int, metavar="N", help="What is sent follows from it.  [default: another each time]"
)
@click.option("--episode", type=int, metavar="N", help="Only this connection of the seed, once.")
@click.option(
    "--control", "control_path", type=PATH, metavar="SOCKET", help="The control socket of a hostzero device."
)
@click.option("--json", "json_path", type=PATH, help="Write the report; - is stdout.")
def command(
    *,
    target: str,
    seconds: float,
    seed: int | None,
    episode: int | None,
    control_path: Path | None,
    json_path: Path | None,
) -> None:
    """Send malformed messages and hostile rings to a running balloon backend, and watch it.

    TARGET is a vhost-user socket, as in unix:/run/balloon.sock or the path alone, that serves nobody
    else meanwhile. Connection after connection: messages of wrong sizes, values, descriptors and
    order; rings with anything in them; floods; bad ends. After each the process has to live, to
    answer, to hold no more descriptors and memory than before, and to have touched no byte that no
    request gave away. In between well-formed requests have to be served, and their claims be true.

    With --control the backend is a hostzero device: `status` has to answer, too, and no session
    may end by itself.

    Exit status: 0 nothing found, 1 something found, 2 nobody listens or an option is wrong.
    """
    from hostzero.conform.fuzz.run import fuzz
    from hostzero.conform.fuzz.show import open_progress, print_report

    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be above zero")
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed {seed}: must be from 0 to {LARGEST_SEED}")
    if episode is not None and (episode < 0 or seed is None):
        raise UsageError(f"--episode {episode}: is a number from 0 on, and needs the --seed that it is of")
    check_outputs({"--json": json_path})
    path = Path(target.removeprefix("unix:"))
    with open_progress(seconds) as progress:
        report = fuzz(
            path,
            seconds=seconds,
            seed=secrets.randbelow(LARGEST_SEED + 1) if seed is None else seed,
            control=control_path,
            episode=episode,
            progress=progress,
        )
    write_output(json_path, to_json(report.to_json()))
    rerun = ["hostzero", "fuzz", target]
    rerun += [] if control_path is None else ["--control", str(control_path)]
    print_report(report, console_beside(json_path), rerun)
    if not report.ok:
        raise click.exceptions.Exit(1)
