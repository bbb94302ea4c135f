# SPDX-License-Identifier: GPL-2.0-only
"""The entry point ``hostzero``: finds the command, and turns every error into one line and a status.

Exit statuses: 0 done; 1 something hostzero found wrong (`HostzeroError`); 2 the user
can mend it (`UsageError`, `BackingUnavailable`, a wrong option); 130 interrupted;
141 whoever read our output went away.

Commands are imported when they are run, so that ``hostzero --help`` imports neither
numpy nor numba.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final, NamedTuple

import click

from hostzero.errors import BackingUnavailable, HostzeroError, UsageError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell says it
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE


class LazyCommand(NamedTuple):
    """Where a command lives, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS: Final = {
    "bench": LazyCommand("hostzero.cli.bench", "Measure what known-zero pages save, and what it leaves out."),
    "check": LazyCommand("hostzero.cli.check", "Search for one page that is believed zero and is not."),
    "conform": LazyCommand(
        "hostzero.cli.conform", "Judge a balloon device by the specification, case by case."
    ),
    "fuzz": LazyCommand(
        "hostzero.cli.fuzz", "Send a running balloon backend what no driver would, and watch it."
    ),
    "device": LazyCommand("hostzero.cli.device", "Be the balloon of a virtual machine (vhost-user)."),
    "ctl": LazyCommand("hostzero.cli.ctl", "Steer a running device: resize, statistics, hinting, status."),
    "top": LazyCommand("hostzero.cli.top", "Watch a running device in the terminal."),
    "vm": LazyCommand(
        "hostzero.cli.vm", "Real virtual machines: prepare, boot, compare with QEMU's balloon."
    ),
}
"""Every command; its module has a click command named ``command``."""


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name].module).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name].module}.command is no click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from `COMMANDS`, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in COMMANDS.items()])


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"hostzero {version('hostzero')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version.",
)
def cli() -> None:
    """Guest pages that the host has zeroed are not zeroed again.

    A guest page allocator that knows which pages are zero, a virtio-balloon driver
    and device that tell each other so, and the means to measure and to check it.
    """


def run(arguments: list[str] | None = None) -> int:
    """Run ``hostzero`` with `arguments` (default: the process's) and return the exit status.

    Every error ends here: one line on standard error that names the command, no traceback
    for anything in the `HostzeroError` tree. An error outside the tree is a defect of
    hostzero and keeps its traceback.
    """
    where = "hostzero"
    try:
        with cli.make_context(where, list(sys.argv[1:] if arguments is None else arguments)) as ctx:
            try:
                cli.invoke(ctx)
            finally:
                if ctx.invoked_subcommand:
                    where = f"{where} {ctx.invoked_subcommand}"
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        return _fail(error.ctx.command_path if error.ctx else where, error.format_message(), EXIT_USAGE)
    except click.ClickException as error:
        return _fail(where, error.format_message(), EXIT_USAGE)
    except (UsageError, BackingUnavailable) as error:
        return _fail(where, str(error), EXIT_USAGE)
    except HostzeroError as error:
        return _fail(where, str(error), EXIT_FAILED)
    except (KeyboardInterrupt, click.Abort):
        return _fail(where, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def _fail(where: str, message: str, status: int) -> int:
    label = "" if status == EXIT_INTERRUPTED else "error: "
    click.echo(f"{where}: {label}{' '.join(message.split())}", err=True)
    return status


def main() -> None:
    """Run ``hostzero`` and exit with its status."""
    sys.exit(run())
