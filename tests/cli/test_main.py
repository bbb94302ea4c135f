# SPDX-License-Identifier: GPL-2.0-only
"""The entry point: quick help, and one line and the right status for every kind of error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types

import click
import pytest

from hostzero.cli import main
from hostzero.errors import BackingUnavailable, OutOfMemory, RingError, UsageError

HEAVY = ("numpy", "numba", "scipy", "rich", "matplotlib")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Install a command ``fail`` that raises whatever the list holds, or returns if it is empty."""
    errors: list[BaseException] = []

    @click.command()
    def command() -> None:
        click.echo("working")
        if errors:
            raise errors[0]

    module = types.ModuleType("hostzero.cli.fail")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hostzero.cli.fail", module)
    monkeypatch.setitem(main.COMMANDS, "fail", main.LazyCommand("hostzero.cli.fail", "Fail."))
    return errors


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in main.COMMANDS)]
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    """A subprocess, because this one has imported everything."""
    program = (
        "import sys\nfrom hostzero.cli.main import run\n"
        f"status = run({arguments!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in main.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", shown, re.MULTILINE), name


def test_every_command_can_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    for name in main.COMMANDS:
        assert main.run([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: hostzero {name}" in shown
        # A marker for Click that came through as text, and what it keeps from being wrapped.
        assert "\\b" not in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"hostzero {version('hostzero')}\n"


def test_module_and_script_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hostzero", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("hostzero ")


def test_success_is_silent_on_standard_error(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["fail"]) == 0
    assert capsys.readouterr() == ("working\n", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("--size 3G: does not fit"), 2),
        (BackingUnavailable("no hugetlb pages: reserve 512"), 2),
        (OutOfMemory("no page of order 9"), 1),
        (RingError("descriptor 3 loops"), 1),
        (click.ClickException("no such file"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_that_names_the_command(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], error: Exception, status: int
) -> None:
    failing.append(error)
    assert main.run(["fail"]) == status
    assert capsys.readouterr().err == f"hostzero fail: error: {error}\n"


def test_a_long_text_is_still_one_line(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(UsageError("first\n   second"))
    assert main.run(["fail"]) == 2
    assert capsys.readouterr().err == "hostzero fail: error: first second\n"


def test_an_error_outside_the_tree_keeps_its_traceback(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        main.run(["fail"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_ends_with_130(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    failing.append(error)
    assert main.run(["fail"]) == 130
    assert capsys.readouterr().err == "hostzero fail: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "hostzero: error: Missing command.\n"),
        (["nonsense"], "hostzero: error: No such command 'nonsense'.\n"),
        (["--bogus"], "hostzero: error: No such option '--bogus'.\n"),
        (["fail", "--bogus"], "hostzero fail: error: No such option '--bogus'.\n"),
        (["fail", "extra"], "hostzero fail: error: Got unexpected extra argument (extra)\n"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main.run(arguments) == 2
    assert capsys.readouterr().err == message


def test_a_reader_that_went_away_is_no_complaint() -> None:
    """The pipe's read end is closed before the program writes, as `| head -0` may do."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hostzero", "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (main.EXIT_BROKEN_PIPE, "")


def test_the_statuses_are_those_of_a_shell() -> None:
    assert main.EXIT_INTERRUPTED == 128 + signal.SIGINT
    assert main.EXIT_BROKEN_PIPE == 128 + signal.SIGPIPE
