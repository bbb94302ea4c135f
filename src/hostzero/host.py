# SPDX-License-Identifier: GPL-2.0-only
"""The machine that a run was measured on, as far as it bears on the numbers.

No host name, user or path: a document may be published as it is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("hostzero", "numba", "llvmlite", "numpy", "scipy")
_THP: Final = Path("sys/kernel/mm/transparent_hugepage")
_REPORTING: Final = Path("sys/module/page_reporting/parameters/page_reporting_order")


def describe_host(*, hardware_counters: str = "not asked for", root: Path = Path("/")) -> dict[str, object]:
    """Return what `results` keeps of this machine; `root` is where proc and sys are.

    ``hardware_counters`` is what `Counters.hardware` said: the scope, or why there are none.

    ``outer_reporting_order`` is the page reporting order of this machine's own kernel, or
    null. When it is set, this machine is a guest that gives free memory to *its* host, and
    memory the benchmark discards may be slow to come back after a second or so.
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    meminfo = _meminfo(root)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _field(cpuinfo, "model name") or _field(cpuinfo, "Model") or "unknown",
        "cpus_usable": len(os.sched_getaffinity(0)),
        "hypervisor": "hypervisor" in _field(cpuinfo, "flags").split(),
        "memory_bytes": meminfo.get("MemTotal", 0),
        "thp": {name: _chosen(_read(root / _THP / name)) for name in ("enabled", "defrag", "shmem_enabled")},
        "outer_reporting_order": _number(_read(root / _REPORTING)),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware_counters": hardware_counters,
    }


def machine_line(host: Mapping[str, object]) -> str:
    """Return what `describe_host` found in a few words: processor, memory, kernel."""
    virtual = "a virtual machine, " if host.get("hypervisor") else ""
    memory = host.get("memory_bytes")
    gib = memory >> 30 if isinstance(memory, int) else 0
    cpus = f"{host.get('cpu')}, {host.get('cpus_usable')} CPUs"
    return f"{virtual}{cpus}, {gib} GiB, Linux {host.get('kernel')}"


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that a new program could use: MemAvailable, or less in a limited cgroup (v2)."""
    available = _meminfo(root).get("MemAvailable", 0)
    for group in _cgroups(root):
        limit, used = _number(_read(group / "memory.max")), _number(_read(group / "memory.current"))
        if limit is not None and used is not None:
            available = min(available, max(limit - used, 0))
    return available


def memory_limit(root: Path = Path("/")) -> int:
    """Return the bytes that a program could have if nobody else ran: all memory, or a cgroup's limit (v2)."""
    limits = [_number(_read(group / "memory.max")) for group in _cgroups(root)]
    return min([_meminfo(root).get("MemTotal", 0), *(limit for limit in limits if limit is not None)])


def _cgroups(root: Path) -> list[Path]:
    # A limit binds everything below it, so every ancestor counts.
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy == "0":
            base = root / "sys/fs/cgroup"
            own = base / path.lstrip("/")
            return [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
    return []


def _meminfo(root: Path) -> dict[str, int]:
    sizes = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            sizes[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return sizes


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _chosen(text: str) -> str | None:
    # "always [madvise] never" marks the setting in force.
    _, bracket, rest = text.partition("[")
    return rest.partition("]")[0] if bracket else None


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
