# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

from hostzero.vm.command_line import GuestOptions
from hostzero.vm.qemu_balloon import guest_with_qemu_balloon
from hostzero.vm.steps import resize
from tests.vm.stand_in import MIB, prepared_with, write_qemu


def test_qmp_counts_what_is_left_and_this_counts_the_balloon(tmp_path: Path) -> None:
    options = GuestOptions(memory=64 * MIB, hostzero=False, qemu=True)
    prepared = prepared_with(tmp_path, write_qemu(tmp_path / "qemu"))
    with guest_with_qemu_balloon(prepared, options, 30) as (guest, balloon):
        assert balloon.actual() == 0
        resize(balloon, 24 * MIB, 5)
        assert balloon.actual() == 24 * MIB
        assert guest.qmp("query-balloon") == {"actual": 40 * MIB}
    assert not guest.folder.exists()
