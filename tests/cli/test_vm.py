# SPDX-License-Identifier: GPL-2.0-only
"""``hostzero vm`` from arguments to exit status and files; the machines behind it are in tests/vm."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostzero.cli.main import run
from hostzero.errors import VmError
from hostzero.vm.accel import Accel
from hostzero.vm.compare import SETTINGS, Plan
from hostzero.vm.demo import Look, Phase, Run
from hostzero.vm.steps import MIB
from tests.vm.samples import comparison
from tests.vm.stand_in import prepared_with, write_qemu


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("hostzero.host.memory_limit", lambda: 64 << 30)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that is prepared, on a machine without KVM."""
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu"))
    monkeypatch.setattr("hostzero.vm.prepared.load", lambda cache: prepared)
    monkeypatch.setattr("hostzero.vm.accel.choose", lambda *given: Accel("tcg", "there is no /dev/kvm"))


@pytest.fixture
def plans(ready: None, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What `vm compare` was told to do; it does nothing."""
    seen: list[Plan] = []

    def compared(prepared: object, accel: Accel, plan: Plan, progress: object) -> object:
        seen.append(plan)
        return comparison(huge_pages=plan.huge_pages)

    monkeypatch.setattr("hostzero.vm.compare.run_compare", compared)
    return seen


@pytest.mark.parametrize("command", ["run", "compare"])
def test_without_a_cache_it_says_what_to_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["vm", command, "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"hostzero vm: error: nothing is prepared in {tmp_path}: run 'hostzero vm setup' first\n"
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "--memory", "1G"], "--memory 1G: at least 2G, and a multiple of 2M"),
        (["run", "--memory", "4097M"], "a multiple of 2M"),
        (["run", "--memory", "much"], "'much' is not a size"),
        (["run", "--accel", "xen"], "'xen' is not one of"),
        (["run", "--json", "none/x.json"], "--json none/x.json: there is no directory"),
        (["compare", "--json", "none/x.json"], "--json none/x.json: there is no directory"),
        (["compare", "--markdown", "none/x.md"], "--markdown none/x.md: there is no directory"),
        (["compare", "--repeat", "0"], "0 is not in the range"),
        (["setup", "--json", "none/x.json"], "--json none/x.json: there is no directory"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_wrong_arguments_are_2(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", *arguments]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("features", "why"),
    [("foo", "'foo' is not"), ("+stats-vq,foo", "mixes names"), ("device-init-reported", "offer reporting")],
)
def test_features_are_refused_before_anything_starts(
    features: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hostzero.vm.prepared.load", None)
    assert run(["vm", "run", "--features", features]) == 2
    shown = capsys.readouterr().err
    assert f"error: --features {features}: " in shown
    assert why in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "--memory", "8G"], "--memory 8G: the guest would have 8G, and this host has 3072M"),
        (["compare"], "the two guests would have 4G, and this host has 3072M"),
    ],
)
def test_memory_that_the_host_does_not_have_is_refused_before_anything_starts(
    arguments: list[str],
    why: str,
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hostzero.host.memory_limit", lambda: 3 << 30)
    monkeypatch.setattr("hostzero.vm.accel.choose", None)
    assert run(["vm", *arguments]) == 2
    assert why in capsys.readouterr().err
    assert plans == []


def test_a_comparison_as_tables_and_files(
    plans: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, markdown = tmp_path / "c.json", tmp_path / "c.md"
    assert run(["vm", "compare", "--repeat", "2", "--json", str(document), "--markdown", str(markdown)]) == 0
    assert plans == [Plan(SETTINGS, 2)]
    assert "hostzero over QEMU" in capsys.readouterr().out
    assert json.loads(document.read_text())["settings"][0]["append"] == "init_on_alloc=0"
    assert markdown.read_text().startswith("Measured ")


def test_the_document_alone_on_standard_output(plans: list[Plan], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "compare", "--json", "-", "--append", "a=1", "--append", ""]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["format"] == 1
    assert "hostzero over QEMU" in captured.err
    assert plans == [Plan(("a=1", ""), 5)]


def test_markdown_alone_on_standard_output(
    plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    assert run(["vm", "compare", "--markdown", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Measured ")
    assert "hostzero over QEMU" in captured.err
    assert list(tmp_path.iterdir()) == before


def test_huge_pages_that_are_missing_are_2(
    plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hostzero.vm import huge_pages

    for name in ("nr_hugepages", "free_hugepages", "resv_hugepages"):
        (tmp_path / name).write_text("0\n")
    real = huge_pages.require_pages
    monkeypatch.setattr(huge_pages, "require_pages", lambda size: real(size, tmp_path))
    assert run(["vm", "compare", "--hugetlb"]) == 2
    assert "--hugetlb: 2G needs 1024 free 2 MiB pages" in capsys.readouterr().err
    assert plans == []


def test_a_guest_that_fails_is_1(
    ready: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failed(*given: object) -> None:
        raise VmError("the guest did not start")

    monkeypatch.setattr("hostzero.vm.compare.run_compare", failed)
    assert run(["vm", "compare"]) == 1
    assert capsys.readouterr().err == "hostzero vm: error: the guest did not start\n"


def test_sigterm_ends_a_comparison_and_its_guests(ready: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    @contextmanager
    def guest() -> Iterator[None]:
        try:
            yield
        finally:
            ended.append("guest")

    def terminated(*given: object) -> None:
        with guest():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("hostzero.vm.compare.run_compare", terminated)
    with pytest.raises(SystemExit) as caught:
        run(["vm", "compare"])
    assert caught.value.code == 143
    assert ended == ["guest"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_says_what_happened_and_why_there_is_no_kvm(
    ready: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Run("tcg", "11.1", "7.2", [6, 7], [1], [Phase("boot", 5.0, Look(backed=7 * MIB), "Linux 7.2")])
    asked: dict[str, object] = {}

    def demo(*given: object, **named: object) -> Run:
        asked.update(named)
        return found

    monkeypatch.setattr("hostzero.vm.demo.run_demo", demo)
    assert run(["vm", "run", "--memory", "2G", "--features", "-stats-vq"]) == 0
    captured = capsys.readouterr()
    assert "bits offered 6, 7; taken by the driver 1" in captured.out
    assert "without KVM: there is no /dev/kvm" in captured.err
    assert asked == {"memory": 2 << 30, "features": "-stats-vq"}


def test_setup_says_what_is_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu"))
    asked: dict[str, object] = {}

    def setup(cache: Path, progress: object, **named: object) -> object:
        asked.update(named, cache=cache)
        return prepared

    monkeypatch.setattr("hostzero.vm.setup.setup", setup)
    assert run(["vm", "setup", "--cache", str(tmp_path), "--fresh", "--json", str(tmp_path / "s.json")]) == 0
    assert "kernel  7.2.0-test" in capsys.readouterr().out
    assert asked == {"cache": tmp_path, "mirror": None, "qemu": None, "fresh": True}
    assert json.loads((tmp_path / "s.json").read_text())["kernel"]["release"] == "7.2.0-test"
