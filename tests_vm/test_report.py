# SPDX-License-Identifier: GPL-2.0-only
"""Free page reporting: memory comes back, and nothing else does."""

from __future__ import annotations

from hashlib import sha1

import pytest

from hostzero.units import PAGE_SIZE
from hostzero.vm.backend import Backend
from hostzero.vm.guest import Guest
from hostzero.vm.steps import (
    MIB,
    SLACK,
    checksum,
    dirty_and_free,
    marked_page,
    settle,
    wait_backed_below,
    write_marked,
    write_random,
)
from tests_vm.conftest import Start

LIVE = 48 * MIB
FREED = 512 * MIB
SECONDS = 120
PIECES = FREED // 4
"""What may stay in pieces below 2 MiB, between pages that live: no guest reports those. How much it
is depends on how the guest's files came to lie; on a busy machine 98 MiB were seen."""


def rest(guest: Guest, backend: Backend) -> int:
    settle(guest, backend.cpu_seconds)
    return guest.memory.backed()


def test_memory_that_a_process_leaves_behind_goes_back_to_the_host(start: Start) -> None:
    with start() as (guest, backend):
        guest.load_driver()
        before = rest(guest, backend)
        for _ in range(2):
            discarded = backend.status()["metrics"]["device"]["reporting"]["discarded_bytes"]
            guest.agent.run("mount -o remount,huge=always /mnt; true")
            write_marked(guest, "/mnt/dirty", "dirty", FREED)
            assert guest.memory.backed() >= FREED
            guest.agent.run("rm /mnt/dirty")
            wait_backed_below(guest, before + SLACK, SECONDS)
            dirty_and_free(guest, FREED)
            wait_backed_below(guest, before + SLACK, SECONDS)
            reporting = backend.status()["metrics"]["device"]["reporting"]
            assert reporting["discarded_bytes"] - discarded >= FREED
            assert reporting["malformed"] == reporting["discard_failed"] == 0


@pytest.mark.parametrize("append", ["", "init_on_free=1", "init_on_alloc=0"])
def test_live_pages_keep_their_bytes_and_reported_ones_read_as_zero(start: Start, append: str) -> None:
    live, freed = marked_page("live"), marked_page("freed")
    with start(append) as (guest, backend):
        guest.load_driver()
        before = rest(guest, backend)
        # Pieces of live memory between pieces that are freed, so that neighbours differ.
        sums = {}
        for part in range(4):
            write_marked(guest, f"/mnt/freed{part}", "freed", FREED // 4)
            sums[f"/mnt/live{part}"] = write_random(guest, f"/mnt/live{part}", LIVE // 4)
            write_marked(guest, f"/mnt/marked{part}", "live", LIVE // 4)
        live_pages, freed_pages = guest.memory.pages_with(live), guest.memory.pages_with(freed)
        # The copies that the guest made of its 1 MiB on the way are not counted.
        assert len(live_pages) >= LIVE // PAGE_SIZE
        assert len(freed_pages) >= FREED // PAGE_SIZE
        guest.agent.run("rm /mnt/freed*")
        wait_backed_below(guest, before + 2 * LIVE + PIECES, SECONDS)
        settle(guest, backend.cpu_seconds)

        # Reported pages read as zero: none of them has what was written there.
        left = guest.memory.pages_with(freed)
        assert len(left) * PAGE_SIZE <= PIECES
        # Not only gone from sight: where the marks were are holes, which read as zero.
        gone = sorted(freed_pages - left)
        holes = [page for page in gone if guest.memory.read(page * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)]
        assert len(holes) * PAGE_SIZE >= FREED - PIECES
        # Live pages are where they were, with their bytes.
        assert len(live_pages - guest.memory.pages_with(live)) * PAGE_SIZE <= MIB
        for path, expected in sums.items():
            assert checksum(guest, path) == expected

        # The guest takes the memory again, and its bytes stay, too.
        write_marked(guest, "/mnt/again", "again", FREED)
        assert len(guest.memory.pages_with(marked_page("again"))) >= FREED // PAGE_SIZE
        for path, expected in sums.items():
            assert checksum(guest, path) == expected
        assert checksum(guest, "/mnt/again") == sha1(marked_page("again") * (FREED // PAGE_SIZE)).hexdigest()
        for part in range(4):
            expected = sha1(live * (LIVE // 4 // PAGE_SIZE)).hexdigest()
            assert checksum(guest, f"/mnt/marked{part}") == expected


def test_init_on_free_brings_a_poison_value_that_the_device_knows(start: Start) -> None:
    with start("init_on_free=1", features="+page-poison") as (guest, backend):
        guest.load_driver()
        before = rest(guest, backend)
        acked = guest.acked_features("hostzero")
        assert {4, 5} <= acked
        assert backend.status()["device"]["poison_val"] == 0
        dirty_and_free(guest, FREED)
        wait_backed_below(guest, before + SLACK, SECONDS)


def test_init_on_free_without_the_poison_bit_does_not_report(start: Start) -> None:
    with start("init_on_free=1", features="-page-poison") as (guest, backend):
        guest.load_driver()
        assert not guest.acked_features("hostzero") & {4, 5}
        dirty_and_free(guest, 64 * MIB)
        assert backend.status()["metrics"]["device"]["reporting"]["requests"] == 0
