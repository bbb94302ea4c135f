# SPDX-License-Identifier: GPL-2.0-only
"""The machine described from a made-up /proc and /sys, and from this one."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from hostzero.host import available_memory, describe_host, machine_line, memory_limit

CPUINFO = "processor\t: 0\nmodel name\t: Great CPU @ 1 GHz\nflags\t\t: fpu hypervisor sse\n"
MEMINFO = "MemTotal:  4096 kB\nMemAvailable:  1024 kB\nHugePages_Total:  3\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        "proc/cpuinfo": CPUINFO,
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/kernel/mm/transparent_hugepage/defrag": "always defer [defer+madvise] madvise never\n",
        "sys/module/page_reporting/parameters/page_reporting_order": "9\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def cgroup(root: Path, name: str, limit: str, current: str) -> None:
    folder = root / "sys/fs/cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(current)


def test_describes_the_machine(root: Path) -> None:
    host = describe_host(root=root, hardware_counters="user only")
    assert host["cpu"] == "Great CPU @ 1 GHz"
    assert host["hypervisor"] is True
    assert host["memory_bytes"] == 4096 * 1024
    assert host["thp"] == {"enabled": "madvise", "defrag": "defer+madvise", "shmem_enabled": None}
    assert host["outer_reporting_order"] == 9
    assert host["hardware_counters"] == "user only"


def test_a_machine_without_any_of_it_is_described_too(tmp_path: Path) -> None:
    host = describe_host(root=tmp_path)
    assert host["cpu"] == "unknown"
    assert host["hypervisor"] is False
    assert host["outer_reporting_order"] is None
    assert available_memory(tmp_path) == 0


def test_the_limit_is_the_tightest_of_machine_and_cgroups(root: Path) -> None:
    assert memory_limit(root) == 4096 * 1024
    cgroup(root, "outer", "3000000", "2999999")
    cgroup(root, "outer/inner", "max", "5")
    assert memory_limit(root) == 3000000
    cgroup(root, "outer", str(1 << 40), "0")
    assert memory_limit(root) == 4096 * 1024


def test_this_machine_is_plain_json_without_its_name() -> None:
    text = json.dumps(describe_host())
    assert platform.release() in text
    assert f'"{platform.node()}"' not in text


def test_available_memory_of_this_machine_is_below_its_total() -> None:
    total = describe_host()["memory_bytes"]
    assert isinstance(total, int)
    assert 0 < available_memory() < total


def test_available_memory_without_a_limit(root: Path) -> None:
    cgroup(root, "outer", "max\n", "5000\n")
    assert available_memory(root) == 1024 * 1024


def test_the_tightest_cgroup_on_the_way_up_decides(root: Path) -> None:
    cgroup(root, "outer/inner", "900000\n", "0\n")
    cgroup(root, "outer", "800000\n", "100000\n")
    assert available_memory(root) == 700000


def test_a_cgroup_over_its_limit_has_nothing_left(root: Path) -> None:
    cgroup(root, "outer", "1000\n", "2000\n")
    assert available_memory(root) == 0


def test_other_cgroup_hierarchies_are_passed_over(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:memory:/outer\n1:name=systemd:/\n")
    cgroup(root, "outer", "1000\n", "0\n")
    assert available_memory(root) == 1024 * 1024


def test_a_machine_in_a_line() -> None:
    host = {"hypervisor": True, "cpu": "X", "cpus_usable": 2, "memory_bytes": 5 << 30, "kernel": "6.1"}
    assert machine_line(host) == "a virtual machine, X, 2 CPUs, 5 GiB, Linux 6.1"
    assert machine_line({"cpu": "X", "cpus_usable": 1, "kernel": "6"}) == "X, 1 CPUs, 0 GiB, Linux 6"
