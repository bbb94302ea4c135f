# SPDX-License-Identifier: GPL-2.0-only
"""Mirror of ``hostzero.cli.output``, and that no command makes a file whose name is ``-``."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from hostzero.cli.main import COMMANDS, LazyGroup
from hostzero.cli.output import STDOUT, check_outputs, console_beside, write_output
from hostzero.errors import UsageError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("content", ["text\n", b"text\n"])
def test_a_document_goes_to_a_file_to_standard_output_or_nowhere(
    content: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (None, STDOUT, Path("file")):
        write_output(path, content)
    assert capsys.readouterr().out == "text\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert Path("file").read_text() == "text\n"


def test_tables_leave_standard_output_to_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    console_beside(None, Path("file")).print("tables")
    console_beside(None, STDOUT).print("beside")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("tables\n", "beside\n")


def test_standard_output_takes_one_document() -> None:
    check_outputs({"--json": STDOUT, "--junit": Path("file"), "--plot": None})
    with pytest.raises(UsageError, match=r"^--json and --junit: only one of them may be -"):
        check_outputs({"--json": STDOUT, "--junit": STDOUT})


def test_a_file_that_cannot_be_written_is_refused_by_its_option() -> None:
    with pytest.raises(UsageError, match=r"^--junit none/file: there is no directory none"):
        check_outputs({"--json": None, "--junit": Path("none/file")})


def test_every_option_that_writes_text_says_so() -> None:
    group = LazyGroup()
    context = click.Context(group)
    commands: list[click.Command] = []
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        commands += command.commands.values() if isinstance(command, click.Group) else [command]
    options = [option for each in commands for option in each.params if isinstance(option, click.Option)]
    writing = [option for option in options if {"--json", "--junit", "--markdown"} & set(option.opts)]
    files = [option for option in writing if not option.is_flag]
    assert files
    assert all((option.help or "").endswith("- is stdout.") for option in files)
