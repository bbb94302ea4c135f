# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero conform``: options in, a report out; the work is in `hostzero.conform`."""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hostzero.cli.output import PATH, STDOUT, check_outputs, console_beside, write_output
from hostzero.document import to_json
from hostzero.termination import terminable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostzero.conform.result import Report


@click.command(name="conform")
@click.argument("target", required=False)
@click.option(
    "--case",
    "names",
    multiple=True,
    metavar="ID",
    help="Only this case, or those that begin so, as in bit6-; may be given more than once.",
)
@click.option("--list", "list_only", is_flag=True, help="Show what cases there are, and run none.")
@click.option("--json", "json_path", type=PATH, help="Write the report; - is stdout.")
@click.option("--junit", "junit_path", type=PATH, help="Write the report as JUnit XML; - is stdout.")
@click.option(
    "--known", "known_path", type=PATH, metavar="FILE", help="Deviations that are known, with reasons."
)
@click.option(
    "--control", "control_path", type=PATH, metavar="SOCKET", help="The control socket of a hostzero device."
)
@click.option("--qemu", metavar="PATH", help="Judge the virtio-balloon-pci of this QEMU; no TARGET then.")
@click.option(
    "--qemu-arg",
    "qemu_arguments",
    multiple=True,
    metavar="ARG",
    help="One more argument for that QEMU; may be given more than once.",
)
@click.option("--strict", is_flag=True, help="Fail where a SHOULD is missed, too.")
@click.option(
    "--backing", default="memfd", metavar="NAME", help="What guest memory is made of.  [default: memfd]"
)
@click.option("-v", "--verbose", is_flag=True, help="List the cases that pass, too, and show log lines.")
def command(
    *,
    target: str | None,
    names: tuple[str, ...],
    list_only: bool,
    json_path: Path | None,
    junit_path: Path | None,
    known_path: Path | None,
    control_path: Path | None,
    qemu: str | None,
    qemu_arguments: tuple[str, ...],
    strict: bool,
    backing: str,
    verbose: bool,
) -> None:
    """Judge a balloon device: as a careful and as a hostile driver would use it.

    TARGET is a vhost-user socket, as in unix:/run/balloon.sock or the path alone: hostzero is the
    front end, and owns the guest memory. Or it is "in-process": the device core of hostzero itself.
    With --qemu instead it is QEMU's own balloon, driven over qtest and real PCI registers in a QEMU
    without a guest.

    Every case gets a fresh device and memory of its own. A case that fails shows the clause, what
    was sent, what came back, and how to run it alone.

    A run that ends before its last case, because the device is gone or somebody ends it, reports
    what was judged until then, and the rest as not run.

    Exit status: 0 no case failed, 1 one failed or was not run, or the list of known deviations is
    out of date, 2 the device cannot be reached or an option is wrong.
    """
    from hostzero.conform.known import load_known
    from hostzero.conform.suite import select

    cases = select(names)
    if list_only:
        from hostzero.conform.show import print_cases
        from hostzero.render import open_console

        print_cases(cases, open_console(to_stderr=False))
        return
    check_outputs({"--json": json_path, "--junit": junit_path})
    known = {} if known_path is None else load_known(known_path)
    from hostzero.conform.progress import open_progress
    from hostzero.conform.run import run_suite
    from hostzero.conform.show import print_report
    from hostzero.conform.targets import open_target

    device = open_target(
        target, control=control_path, backing=backing, qemu=qemu, qemu_arguments=qemu_arguments
    )
    rerun = ["hostzero", "conform", *([] if target is None else [target])]
    rerun += [] if qemu is None else ["--qemu", qemu]
    rerun += [f"--qemu-arg={argument}" for argument in qemu_arguments]
    rerun += [] if control_path is None else ["--control", str(control_path)]
    rerun += [] if backing == "memfd" else ["--backing", backing]
    rerun += ["--strict"] if strict else []
    # A device in this process logs each hostile request, and that is what it is given.
    with terminable():
        with (
            _log_level(logging.DEBUG if verbose else logging.CRITICAL),
            open_progress(len(cases)) as progress,
        ):
            report = run_suite(device, cases, known=known, strict=strict, rerun=rerun, progress=progress)
            # Before the progress ends: where the terminal is gone, that fails.
            _save(report, json_path, junit_path, piped=False)
        _save(report, json_path, junit_path, piped=True)
    # After a signal there may be no terminal any more.
    with suppress(*([OSError] if report.signal else [])):
        print_report(report, console_beside(json_path, junit_path), verbose=verbose)
    if report.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if report.signal:
        raise click.exceptions.Exit(128 + report.signal)
    if not report.ok:
        raise click.exceptions.Exit(1)


@contextmanager
def _log_level(level: int) -> Iterator[None]:
    log = logging.getLogger("hostzero")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


# What goes to standard output, or what goes to files.
def _save(report: Report, json_path: Path | None, junit_path: Path | None, *, piped: bool) -> None:
    if (json_path == STDOUT) == piped:
        write_output(json_path, to_json(report.to_json()))
    if junit_path is not None and (junit_path == STDOUT) == piped:
        from hostzero.conform.junit import to_junit

        write_output(junit_path, to_junit(report))
