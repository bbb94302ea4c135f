# SPDX-License-Identifier: GPL-2.0-only
"""Inflate, deflate, statistics and hinting with a stock driver."""

from __future__ import annotations

from collections.abc import Callable

from hostzero.units import PAGE_SIZE
from hostzero.vm.backend import Backend
from hostzero.vm.steps import MIB, checksum, settle, wait_balloon_pages, write_random
from hostzero.vm.wait import wait_for
from tests_vm.conftest import Start

SECONDS = 180
TARGETS = [256 * MIB, 1024 * MIB, 700 * MIB + PAGE_SIZE, PAGE_SIZE, 1536 * MIB, 0]


def reached(backend: Backend, target: int) -> Callable[[], bool]:
    return lambda: backend.actual() == target


def test_actual_is_exact_at_every_target_and_the_memory_is_gone(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        settle(guest, backend.cpu_seconds)
        expected = write_random(guest, "/mnt/live", 32 * MIB)
        inflated = 0
        size = 0
        for target in TARGETS:
            backend.resize(target)
            wait_for(reached(backend, target), f"{target // MIB} MiB", SECONDS)
            wait_balloon_pages(guest, target // PAGE_SIZE)
            inflated += max(0, target - size)
            size = target
            # What is in the balloon is not on the host.
            assert guest.memory.backed() <= guest.memory.size - target
        device = backend.status()["metrics"]["device"]
        # Compaction in the guest inflates where a page of the balloon goes and deflates where it was.
        moved = guest.vmstat("balloon_migrate")
        assert device["inflate"]["pfns"] == inflated // PAGE_SIZE + moved
        assert device["inflate"]["discarded_bytes"] == inflated + moved * PAGE_SIZE
        assert device["inflate"]["malformed"] == device["deflate"]["malformed"] == 0
        assert device["deflate"]["pfns"] == inflated // PAGE_SIZE + moved
        assert checksum(guest, "/mnt/live") == expected


def test_a_target_that_changes_on_the_way_is_reached(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        for target in (1024 * MIB, 128 * MIB, 640 * MIB):
            backend.resize(target)
            wait_for(lambda: backend.actual() > 0, "under way", SECONDS)
        wait_for(lambda: backend.actual() == 640 * MIB, "640 MiB", SECONDS)
        wait_balloon_pages(guest, 640 * MIB // PAGE_SIZE)


def test_statistics_are_the_guest_s_own(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()

        def asked() -> dict[str, int]:
            updates = backend.request("stats")["updates"]
            wait_for(lambda: backend.status()["metrics"]["device"]["stats_updates"] > updates, "stats", 30)
            return {name: int(value) for name, value in backend.status()["statistics"].items()}

        first = asked()
        meminfo = dict(line.split(":") for line in guest.agent.read("cat /proc/meminfo").splitlines())
        total = int(meminfo["MemTotal"].split()[0]) * 1024
        free = int(meminfo["MemFree"].split()[0]) * 1024
        assert first["memtot"] == total
        assert abs(first["memfree"] - free) <= 64 * MIB
        write_random(guest, "/mnt/live", 128 * MIB)
        second = asked()
        assert first["memfree"] - second["memfree"] >= 100 * MIB
        assert second["minflt"] > first["minflt"]


def test_hinting_names_free_memory_and_ends_with_done(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        expected = write_random(guest, "/mnt/live", 64 * MIB)
        free = guest.agent.read("grep MemFree /proc/meminfo").split()[1]
        backend.request("hint", action="start")
        hinted = wait_for(
            lambda: (
                backend.status()["metrics"]["device"]["hinted_bytes"]
                if backend.status()["device"]["hint"] == "stopped"
                else 0
            ),
            "the guest has hinted all it has",
            SECONDS,
        )
        assert hinted >= int(free) * 1024 // 2
        backend.request("hint", action="done")

        def given_back() -> bool:
            return int(guest.agent.read("grep MemFree /proc/meminfo").split()[1]) >= int(free) * 0.9

        wait_for(given_back, "the guest has its memory again", SECONDS)
        assert checksum(guest, "/mnt/live") == expected
