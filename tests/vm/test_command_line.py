# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from pathlib import Path

import pytest

from hostzero.vm.command_line import GuestOptions, command_line
from hostzero.vm.prepared import Prepared
from hostzero.vm.qemu import Qemu

PREPARED = Prepared(Path("cache"), Qemu(("qemu",)), "7.2", {}, 0)


def words(**options: object) -> list[str]:
    return command_line(PREPARED, GuestOptions(**options), Path("folder"))  # type: ignore[arg-type]


def after(line: list[str], option: str) -> list[str]:
    return [line[at + 1] for at, word in enumerate(line) if word == option]


def test_hostzero_s_balloon_is_a_generic_vhost_user_device() -> None:
    line = words()
    (device,) = after(line, "-device")
    assert device.startswith("vhost-user-test-device-pci,")
    assert "virtio-id=5,num_vqs=5,vq_size=128,config_size=16" in device
    assert "socket,id=hostzero-socket,path=folder/balloon" in after(line, "-chardev")


@pytest.mark.parametrize(("reporting", "said"), [(True, "on"), (False, "off")])
def test_qemu_s_balloon_offers_what_ours_does(reporting: bool, said: str) -> None:
    line = words(hostzero=False, qemu=True, reporting=reporting)
    (device,) = after(line, "-device")
    expected = f"virtio-balloon-pci,id=qemu,free-page-reporting={said},deflate-on-oom=on,addr=6"
    assert device == expected
    assert not any("balloon" in chardev for chardev in after(line, "-chardev"))


def test_but_for_the_device_two_guests_are_started_alike() -> None:
    both = words(qemu=True)
    ours, theirs = words(), words(hostzero=False, qemu=True)
    assert both[: len(both) - 6] == ours[: len(ours) - 4] == theirs[:-2]


def test_memory_is_shared_and_huge_pages_are_asked_for() -> None:
    assert after(words(memory=1 << 30), "-object") == ["memory-backend-memfd,id=ram,size=1G,share=on"]
    (memory,) = after(words(huge_pages=True), "-object")
    assert memory.endswith(",share=on,hugetlb=on,hugetlbsize=2M")


def test_accelerators_and_the_kernel_s_line() -> None:
    line = words(accel="kvm", append="init_on_free=1")
    assert after(line, "-accel") == ["kvm"]
    assert after(line, "-cpu") == ["host"]
    assert after(line, "-append") == ["console=ttyS0 panic=-1 init_on_free=1"]
    assert after(line, "-kernel") == ["cache/guest/vmlinuz"]
