# SPDX-License-Identifier: GPL-2.0-only
"""Ram and ZeroProof: what is proven is zero, what is refused is untouched, what is closed is gone."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostzero.errors import BackingUnavailable, RamError, RangeError, UsageError
from hostzero.ram import BACKINGS, GuestMemory, Ram, ZeroProof, libc, open_ram, residency
from hostzero.units import PAGE_SIZE, PMD_SIZE
from tests.ram.host import AVAILABLE, LACKING, PAGES, SIZE, fill, mapped, open_descriptors

F_SEAL_FUTURE_WRITE = 0x10

# One region serves all examples of a property: each example fills it again.
shared_region = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)

page_ranges = st.integers(0, PAGES - 1).flatmap(
    lambda first: st.tuples(st.just(first), st.integers(1, PAGES - first))
)


# ------------------------------------------------------------------ opening


def test_every_backing_opens_or_says_what_is_missing() -> None:
    assert set(AVAILABLE) | set(LACKING) == set(BACKINGS)
    assert {"anonymous", "memfd"} <= set(AVAILABLE)
    for name, message in LACKING.items():
        assert message.startswith(f"{name}: ")
        assert "\n" not in message
        assert any(mend in message for mend in ("run ", "use ", "write ", "has no")), message


def test_new_ram_is_aligned_zero_and_of_the_size_asked(ram: Ram) -> None:
    assert ram.base % PMD_SIZE == 0
    assert ram.page_size == (PMD_SIZE if ram.backing == "hugetlb" else PAGE_SIZE)
    assert len(ram.buffer) == ram.size == SIZE
    assert ram.buffer.format == "B"
    assert not ram.array(np.uint64).any()


def test_base_is_the_address_of_the_buffer(ram: Ram) -> None:
    ram.buffer[12345] = 99
    assert ctypes.string_at(ram.base + 12345, 1) == b"\x63"


def test_array_and_buffer_are_the_same_bytes(ram: Ram) -> None:
    ram.array(np.dtype("<u4"))[1] = 0x0102_0304
    assert bytes(ram.buffer[4:8]) == b"\x04\x03\x02\x01"
    assert ram.array("V4096").shape == (PAGES,)


def test_array_of_items_that_do_not_divide_the_region_is_refused(ram: Ram) -> None:
    with pytest.raises(RamError, match="items of 24 bytes"):
        ram.array("V24")
    with pytest.raises(RamError, match="items of 0 bytes"):
        ram.array("V0")


@pytest.mark.parametrize(
    ("size", "mend"),
    [
        (0, "use 2M or more"),
        (-PMD_SIZE, "use 2M or more"),
        (1, "use 2M"),
        (PMD_SIZE + PAGE_SIZE, "use 2M or 4M"),
        (5 << 20, "use 4M or 6M"),
    ],
)
@pytest.mark.parametrize("backing", BACKINGS)
def test_a_size_that_is_not_whole_2m_names_the_mend(backing: str, size: int, mend: str) -> None:
    with pytest.raises(UsageError, match=mend):
        open_ram(size, backing)


def test_unknown_backing_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'floppy': choose one of anonymous, memfd, tmpfs-huge, hugetlb"):
        open_ram(SIZE, "floppy")


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("size", [1 << 46, 1 << 62, 1 << 80])
def test_more_than_physical_memory_is_refused_before_anything_is_mapped(backing: str, size: int) -> None:
    before = open_descriptors()
    with pytest.raises(BackingUnavailable, match=r"physical memory: use \d+[KMGT] or less"):
        open_ram(size, backing)
    assert open_descriptors() == before


@pytest.mark.parametrize("backing", [name for name in AVAILABLE if name != "anonymous"])
def test_a_mapping_that_fails_closes_its_file_and_is_one_clear_line(
    backing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not today")

    monkeypatch.setattr(libc, "map_shared_fixed", refuse)
    before = open_descriptors()
    with pytest.raises(BackingUnavailable, match=f"{backing}: cannot map 8M of guest memory: not today"):
        open_ram(SIZE, backing)
    assert open_descriptors() == before


def test_an_interrupt_while_mapping_closes_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(libc, "map_shared_fixed", interrupt)
    before = open_descriptors()
    with pytest.raises(KeyboardInterrupt):
        open_ram(SIZE, "memfd")
    assert open_descriptors() == before


# ------------------------------------------------------------------ discarding


@shared_region
@given(span=page_ranges)
def test_what_is_proven_reads_zero_and_what_was_not_named_is_untouched(
    ram: Ram, span: tuple[int, int]
) -> None:
    first, count = span
    pages = fill(ram)
    expected = pages.copy()
    offset, length = first * PAGE_SIZE, count * PAGE_SIZE

    proof = ram.discard(offset, length)

    assert proof.error is None
    start = -(-offset // ram.page_size) * ram.page_size
    end = (offset + length) // ram.page_size * ram.page_size
    assert proof.length == max(0, end - start)
    if proof.length:
        assert proof.offset == start
        expected[start // PAGE_SIZE : end // PAGE_SIZE] = 0
    assert np.array_equal(pages, expected)


def test_a_write_after_the_discard_is_kept(ram: Ram) -> None:
    fill(ram)
    assert ram.discard(0, PMD_SIZE).covers(0, PMD_SIZE)
    ram.buffer[5] = 1
    assert bytes(ram.buffer[:8]) == b"\0\0\0\0\0\1\0\0"


def test_the_whole_region_can_be_discarded_twice(ram: Ram) -> None:
    pages = fill(ram)
    for _ in range(2):
        assert ram.discard(0, SIZE) == ZeroProof(0, SIZE)
        assert not pages.any()


any_integer = (
    st.integers() | st.integers(-SIZE, 2 * SIZE) | st.sampled_from([2**64, 2**64 - PAGE_SIZE, 2**63])
)


def is_good(offset: int, length: int) -> bool:
    return (
        length > 0
        and offset >= 0
        and offset + length <= SIZE
        and offset % PAGE_SIZE == 0
        and length % PAGE_SIZE == 0
    )


@shared_region
@given(offset=any_integer, length=any_integer, scale=st.sampled_from([1, PAGE_SIZE]))
def test_a_bad_range_is_refused_before_any_system_call(
    ram: Ram, no_discard_calls: None, offset: int, length: int, scale: int
) -> None:
    offset, length = offset * scale, length * scale
    if is_good(offset, length):
        # The guard itself must be able to fail.
        if ram.page_size == PAGE_SIZE:
            with pytest.raises(AssertionError, match="a system call was made"):
                ram.discard(offset, length)
        return
    with pytest.raises(RangeError):
        ram.discard(offset, length)
    with pytest.raises(RangeError):
        ram.resident(offset, length)


@pytest.mark.parametrize(
    ("offset", "length", "named"),
    [
        (0, 0, "empty"),
        (0, -PAGE_SIZE, "empty"),
        (1, PAGE_SIZE, "not whole 4096-byte pages"),
        (0, PAGE_SIZE // 2, "not whole 4096-byte pages"),
        (-PAGE_SIZE, PAGE_SIZE, "leaves the region"),
        (SIZE, PAGE_SIZE, "leaves the region"),
        (SIZE - PAGE_SIZE, 2 * PAGE_SIZE, "leaves the region"),
        (2**64 - PAGE_SIZE, 2 * PAGE_SIZE, "leaves the region"),
    ],
)
def test_each_bad_range_is_named_and_leaves_every_byte(
    ram: Ram, offset: int, length: int, named: str
) -> None:
    pages = fill(ram)
    before = pages.copy()
    with pytest.raises(RangeError, match=named):
        ram.discard(offset, length)
    assert np.array_equal(pages, before)


def test_numpy_integers_cannot_wrap_round_the_end(ram: Ram) -> None:
    fill(ram)
    with pytest.raises(RangeError):
        ram.discard(np.uint64(2**64 - PAGE_SIZE), np.uint64(2 * PAGE_SIZE))  # type: ignore[arg-type]
    with pytest.raises(RangeError):
        ram.discard(np.int32(PAGE_SIZE), np.int32(2**31 - PAGE_SIZE))  # type: ignore[arg-type]
    assert ram.array(np.uint64).all()


def test_a_refused_call_proves_nothing_and_carries_the_error(
    ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ENOMEM, "stub")

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(libc, "madvise", refuse)
    monkeypatch.setattr(libc, "punch_hole", refuse)
    pages = fill(ram)
    proof = ram.discard(0, PMD_SIZE)
    assert proof == ZeroProof(0, 0, error)
    assert not proof.covers(0, PMD_SIZE)
    assert pages.all()


def test_locked_anonymous_memory_is_refused_by_the_kernel_and_not_proven() -> None:
    libc_so = ctypes.CDLL(None, use_errno=True)
    with open_ram(SIZE) as ram:
        pages = fill(ram)
        address = ctypes.c_void_p(ram.base + PAGE_SIZE)
        assert libc_so.mlock(address, ctypes.c_size_t(PAGE_SIZE)) == 0
        proof = ram.discard(0, PMD_SIZE)
        assert proof.length == 0
        assert proof.error is not None
        assert proof.error.errno == errno.EINVAL
        # The first page went before the kernel met the locked one: a failed call is no
        # statement about any page.
        assert pages[1:].all()
        assert libc_so.munlock(address, ctypes.c_size_t(PAGE_SIZE)) == 0


def test_a_sealed_file_is_refused_by_the_kernel_and_not_proven() -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    with Ram.from_fd(fd, 0, SIZE) as ram:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        os.close(fd)
        pages = fill(ram)
        proof = ram.discard(0, PMD_SIZE)
        assert proof.length == 0
        assert proof.error is not None
        assert proof.error.errno == errno.EPERM
        assert pages.all()


# ------------------------------------------------------------------ the proof itself

small = st.integers(-4, 40)


@given(proof=st.tuples(st.integers(0, 30), st.integers(0, 30)), offset=small, length=small)
def test_covers_agrees_with_sets_of_bytes(proof: tuple[int, int], offset: int, length: int) -> None:
    asked = set(range(offset, offset + length))
    proven = set(range(proof[0], proof[0] + proof[1]))
    assert ZeroProof(*proof).covers(offset, length) == (bool(asked) and asked <= proven)


# ------------------------------------------------------------------ files from other processes


@pytest.fixture
def peer() -> Ram:
    """RAM of another process, as far as the fd is concerned."""
    return open_ram(SIZE, "memfd")


def fd_of(ram: Ram) -> int:
    fd = ram.fileno
    assert fd is not None
    return fd


@pytest.mark.parametrize("offset", [0, PAGE_SIZE, PMD_SIZE, 0xC0000])
def test_a_received_part_is_that_part_of_the_file(peer: Ram, offset: int) -> None:
    with peer, Ram.from_fd(fd_of(peer), offset, PMD_SIZE) as part:
        assert part.base % PMD_SIZE == offset % PMD_SIZE
        assert part.backing == "fd"
        assert part.page_size == PAGE_SIZE
        theirs = fill(peer)
        before = theirs.copy()
        assert part.buffer == peer.buffer[offset : offset + PMD_SIZE]

        proof = part.discard(PAGE_SIZE, 2 * PAGE_SIZE)

        assert proof == ZeroProof(PAGE_SIZE, 2 * PAGE_SIZE)
        first = offset // PAGE_SIZE + 1
        before[first : first + 2] = 0
        assert np.array_equal(theirs, before)


def test_a_received_descriptor_stays_the_callers(peer: Ram) -> None:
    with peer:
        before = open_descriptors()
        Ram.from_fd(fd_of(peer), 0, SIZE).close()
        assert open_descriptors() == before
        assert os.fstat(fd_of(peer)).st_size == SIZE


@pytest.mark.parametrize(
    ("offset", "size", "named"),
    [
        (0, 0, "not whole 4 KiB pages"),
        (1, PAGE_SIZE, "not whole 4 KiB pages"),
        (0, PAGE_SIZE + 1, "not whole 4 KiB pages"),
        (-PAGE_SIZE, PAGE_SIZE, "not whole 4 KiB pages"),
        (SIZE, PAGE_SIZE, "beyond the file"),
        (0, SIZE + PAGE_SIZE, "beyond the file"),
        (2**64 - PAGE_SIZE, 2 * PAGE_SIZE, "beyond the file"),
    ],
)
def test_a_received_part_outside_its_file_is_refused(peer: Ram, offset: int, size: int, named: str) -> None:
    with peer:
        before = open_descriptors()
        with pytest.raises(RangeError, match=named):
            Ram.from_fd(fd_of(peer), offset, size)
        assert open_descriptors() == before


def test_a_received_read_only_descriptor_is_refused(peer: Ram) -> None:
    with peer:
        fd = os.open(f"/proc/self/fd/{fd_of(peer)}", os.O_RDONLY | os.O_CLOEXEC)
        with pytest.raises(BackingUnavailable, match="fd: cannot map 8M: mmap: Permission denied"):
            Ram.from_fd(fd, 0, SIZE)
        os.close(fd)


def test_on_a_filesystem_without_evidence_a_discard_proves_nothing(
    peer: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_super_magic = 0x6573_5546
    monkeypatch.setattr(libc, "filesystem", lambda fd: (fuse_super_magic, 4096))
    with peer, Ram.from_fd(fd_of(peer), 0, SIZE) as ram:
        fill(ram)
        proof = ram.discard(0, PMD_SIZE)
        assert proof == ZeroProof(0, 0)
        assert not ram.buffer[0]  # It was given back all the same.


@settings(shared_region, max_examples=100)
@given(span=page_ranges, file_page=st.sampled_from([0, 1, 160, 511, 512]))
def test_a_huge_page_of_the_file_is_discarded_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, span: tuple[int, int], file_page: int
) -> None:
    """Huge pages start at multiples of 2 MiB in the file, wherever the region starts in it."""
    monkeypatch.setattr(libc, "filesystem", lambda fd: (libc.HUGETLBFS_MAGIC, PMD_SIZE))
    with open_ram(SIZE + PMD_SIZE, "memfd") as file:
        file_offset = file_page * PAGE_SIZE
        everything = fill(file)
        before = everything.copy()
        with Ram.from_fd(fd_of(file), file_offset, SIZE) as ram:
            assert ram.page_size == PMD_SIZE
            assert ram.buffer[0] == file.buffer[file_offset]
            first, count = span
            proof = ram.discard(first * PAGE_SIZE, count * PAGE_SIZE)
        whole = [
            page
            for page in range((SIZE + PMD_SIZE) // PMD_SIZE)
            if first + file_page <= page * 512 and (page + 1) * 512 <= first + file_page + count
        ]
        assert proof.length == len(whole) * PMD_SIZE
        for page in whole:
            before[page * 512 : (page + 1) * 512] = 0
        if whole:
            assert file_offset + proof.offset == whole[0] * PMD_SIZE
        assert np.array_equal(everything, before)


# ------------------------------------------------------------------ closing


def test_close_unmaps_and_closes_everything_once(ram: Ram) -> None:
    fill(ram)
    before = open_descriptors()
    fd = ram.fileno
    ram.close()
    assert ram.closed
    assert not mapped(ram.base)
    assert open_descriptors() == [name for name in before if name != str(fd)]
    # The number may belong to somebody else by now: a second close must leave it alone.
    reused = os.open("/dev/null", os.O_RDONLY)
    ram.close()
    os.fstat(reused)
    os.close(reused)


def test_after_close_every_use_is_an_error(ram: Ram) -> None:
    memory = GuestMemory.whole(ram)
    ram.close()
    with pytest.raises(RamError, match=r"8M, .* is closed"):
        _ = ram.buffer
    with pytest.raises(RamError, match="is closed"):
        _ = ram.fileno
    with pytest.raises(RamError, match="is closed"):
        ram.array(np.uint8)
    with pytest.raises(RamError, match="is closed"):
        ram.discard(0, PMD_SIZE)
    with pytest.raises(RamError, match="is closed"):
        ram.resident()
    with pytest.raises(RamError, match="is closed"):
        memory.read(0, 1)  # type: ignore[arg-type]
    with pytest.raises(RamError, match="is closed"):
        memory.discard(0, PMD_SIZE)  # type: ignore[arg-type]


def test_an_array_that_outlives_close_keeps_its_memory_until_it_goes(ram: Ram) -> None:
    array = ram.array(np.uint8)
    of_buffer = np.frombuffer(ram.buffer, dtype=np.uint8)
    array[7] = 42
    ram.close()
    assert array[7] == 42
    del array
    assert of_buffer[7] == 42
    del of_buffer
    assert not mapped(ram.base)


def test_a_with_block_closes_after_an_exception() -> None:
    before = open_descriptors()
    with pytest.raises(ZeroDivisionError), open_ram(SIZE, "memfd") as ram:
        _ = 1 // 0
    assert ram.closed
    assert open_descriptors() == before


def test_repr_tells_size_backing_and_state(ram: Ram) -> None:
    assert repr(ram) == f"<Ram 8M {ram.backing} at {ram.base:#x}>"
    ram.close()
    assert repr(ram).endswith(" closed>")


def test_a_kernel_that_does_not_answer_about_residency_is_an_error(
    ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EAGAIN, "stub")

    monkeypatch.setattr(residency, "private_resident", refuse)
    monkeypatch.setattr(residency, "shared_resident", refuse)
    with pytest.raises(RamError, match="cannot ask what is resident"):
        ram.resident()
