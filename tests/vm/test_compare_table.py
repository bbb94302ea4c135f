# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import io

from rich.console import Console

from hostzero.stats import PairedRatio
from hostzero.vm.compare_phases import RULE
from hostzero.vm.compare_table import (
    COLUMNS,
    device_rows,
    print_comparison,
    ratio_rows,
    ratio_text,
    to_markdown,
)
from tests.vm.samples import comparison


def test_rows_have_median_spread_n_and_the_disturbed() -> None:
    (setting,) = comparison().settings
    ours, theirs = device_rows(setting, pool=False)
    assert len(ours) == len(theirs) == len(COLUMNS)
    assert ours == (
        "inflate",
        "hostzero",
        "0.750 (0.500–1.000)",
        "0.500 (0.250–0.750)",
        "1.000",
        "1.750 (1.500–2.000)",
        "2.000",
        "32",
        "2 (1)",
    )
    assert theirs[1:4] == ("virtio-balloon-pci", "1.000", "–")
    assert theirs[-1] == "2 (0)"


def test_ratios_are_paired_and_have_their_interval() -> None:
    (setting,) = comparison().settings
    ((phase, device, everything, wall, n),) = ratio_rows(setting)
    assert (phase, n) == ("inflate", "2")
    assert device.startswith("0.71 [")
    assert everything.startswith("0.87 [")
    assert wall == "0.50 [0.50, 0.50]"
    assert ratio_text(PairedRatio(0.5, None, 1, 0)) == "0.50"
    assert ratio_text(PairedRatio(None, None, 0, 2)) == "–"


def test_markdown_says_when_on_what_and_what_is_left_out() -> None:
    text = to_markdown(comparison(), "2030-01-02")
    assert text.startswith(
        "Measured 2030-01-02. Machine: A processor, 2 CPUs, 8 GiB, Linux 6.1. QEMU 11.1.3, "
    )
    assert "software emulation (TCG), one CPU, 2G of memory in 4 KiB pages (memfd)" in text
    assert "**Kernel with init_on_alloc=0**" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[:4]} == {len(COLUMNS) + 1}
    assert RULE in text
    assert "pool pages" not in text


def test_huge_pages_have_a_column_of_their_own() -> None:
    made = comparison(huge_pages=True)
    ours, theirs = device_rows(made.settings[0], pool=True)
    assert (ours[-1], theirs[-1]) == ("16", "0")
    text = to_markdown(made, "2030-01-02")
    assert "n | pool pages |" in text
    assert "2 MiB huge pages (hugetlb)" in text
    assert "MUST_TELL_HOST" in text


def test_the_same_on_a_terminal() -> None:
    stream = io.StringIO()
    print_comparison(comparison(), Console(file=stream, width=140))
    shown = stream.getvalue()
    assert "Kernel with init_on_alloc=0" in shown
    assert "0.750 (0.500–1.000)" in shown
    assert "hostzero over QEMU, paired by repetition" in shown
