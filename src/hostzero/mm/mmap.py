# SPDX-License-Identifier: GPL-2.0-only
"""Processes: address spaces of mappings, and the calls a program makes on them.

Kernel: `mm/mmap.c`, `mm/madvise.c`. Calls take the kernel's arguments and refuse what it
refuses; an address is a plain integer because it belongs to no guest-wide space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from hostzero.errors import BadAddress, MemcgOutOfMemory, MmError, OutOfMemory
from hostzero.mm.memory import (
    copy_user,
    count_mapped,
    fill_range,
    find_nonzero,
    populate_range,
    touch_range,
    zap_page_range,
)
from hostzero.mm.mempolicy import MPOL_DEFAULT, check_policy
from hostzero.mm.mmzone import HPAGE_PMD_ORDER, NO_PAGE
from hostzero.mm.pgtable import TASK_SIZE, alloc_table, free_empty_tables, free_table
from hostzero.mm.swap import pageout_page_range
from hostzero.mm.vma import (
    VM_HUGEPAGE,
    VM_NOHUGEPAGE,
    VM_NORESERVE,
    VM_READ,
    VM_SHARED,
    VM_UNINITIALIZED,
    VM_WRITE,
    new_vma,
)
from hostzero.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from hostzero.mm.hugetlbfs import HugetlbFile
    from hostzero.mm.manager import MemoryManager

MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_PAGEOUT: Final = 21
MADV_POPULATE_WRITE: Final = 23
_ADVICES: Final = (MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_PAGEOUT, MADV_POPULATE_WRITE)

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
MAP_HUGETLB: Final = 0x40000
MAP_HUGE_SHIFT: Final = 26
MAP_HUGE_MASK: Final = 0x3F
MAP_UNINITIALIZED: Final = 0x4000000
"""Ask for pages with whatever they hold. Linux has this for machines without an MMU; the
benchmark uses it as the floor that no allocator can beat. Page tables are still zeroed.
With MAP_HUGETLB the bit is the lowest of the page size's logarithm, as in Linux; alone there
it cannot mean a size, and keeps its meaning here."""

_HUGETLB_FLAGS: Final = (
    MAP_SHARED
    | MAP_PRIVATE
    | MAP_FIXED
    | MAP_NORESERVE
    | MAP_HUGETLB
    | MAP_UNINITIALIZED
    | MAP_HUGE_MASK << MAP_HUGE_SHIFT
)

MMAP_BASE: Final = 0x7F00_0000_0000


class Process:
    """A guest process: an address space on one CPU.

    Use as a context manager, or call `exit`: both give all memory back.
    """

    def __init__(self, mm: MemoryManager, mm_id: int, cpu: int = 0, node: int = 0) -> None:
        """Create an address space with an empty top table.

        Raises:
            OutOfMemory: there is no page for the top table.
        """
        self._mm = mm
        self._mem = mm.mem
        self._cpu = cpu
        self._node = node
        self._mm_id = mm_id
        self._vmas: list[Any] = []
        self._policy = MPOL_DEFAULT, 0
        self._pgd: int = alloc_table(self._mem, node, cpu)
        while self._pgd == NO_PAGE:
            if not mm.out_of_memory():
                raise OutOfMemory("no page for the process's page table")
            self._pgd = alloc_table(self._mem, node, cpu)
        self._mem.mms[mm_id - 1].pgd = self._pgd
        self._mem.mms[mm_id - 1].memcg = 0
        self._mem.mms[mm_id - 1].memcg_in_oom = 0

    def __enter__(self) -> Self:
        """Return the process itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Give all memory back."""
        self.exit()

    @property
    def rss(self) -> int:
        """Bytes of memory mapped into the process, without hugetlb pages (as `VmRSS`)."""
        return (
            sum(
                int(count_mapped(self._mem, self._pgd, low, high))
                for vma, low, high in self._pieces(0, TASK_SIZE)
                if vma[0].hstate < 0
            )
            * PAGE_SIZE
        )

    @property
    def hugetlb_usage(self) -> int:
        """Bytes of hugetlb pages mapped into the process (`HugetlbPages` of `/proc/pid/status`)."""
        return sum(self._mm.hugetlb.usage(vma) for vma in self._vmas if vma[0].hstate >= 0)

    @property
    def memcg(self) -> int:
        """The memory cgroup that the pages of future faults are charged to; 0 is the root.

        What has been charged stays where it is, as in Linux when a process moves.
        """
        return int(self._mem.mms[self._mm_id - 1].memcg)

    @memcg.setter
    def memcg(self, memcg: int) -> None:
        self._alive()
        self._mem.mms[self._mm_id - 1].memcg = self._mm.memcg.check(memcg)

    def exit(self) -> None:
        """Unmap everything and free the page tables; further calls raise `MmError`."""
        if self._pgd == NO_PAGE:
            return
        for start, end, _ in self._stretches(0, TASK_SIZE):
            self.munmap(start, end - start)
        free_table(self._mem, self._pgd, self._cpu)
        self._mem.mms[self._mm_id - 1].pgd = 0
        self._pgd = NO_PAGE

    def mmap(
        self, length: int, flags: int = 0, addr: int = 0, *, file: HugetlbFile | None = None, offset: int = 0
    ) -> int:
        """Map `length` bytes of anonymous private memory, or of a hugetlb file; return the address.

        Mappings of at least 2 MiB start on a 2 MiB boundary, as Linux places them.

        Args:
            length: rounded up to whole pages of the mapping's size.
            flags: `MAP_FIXED` (with `addr`; address 0 is legal) and `MAP_UNINITIALIZED`.
                `MAP_HUGETLB` maps huge pages, of 2 MiB or of the size whose logarithm stands
                at `MAP_HUGE_SHIFT`; with it and with `file`, `MAP_SHARED`, `MAP_PRIVATE` (the
                default) and `MAP_NORESERVE` are known too.
            addr: where to map with `MAP_FIXED`; ignored without.
            file: a hugetlb file to map; implies `MAP_HUGETLB`.
            offset: where in the file, a multiple of its page size.

        Raises:
            MmError: -EINVAL for a bad length or address, -EEXIST for a taken range
                (Linux would replace it; here that is always a mistake).
            OutOfMemory: -ENOMEM, huge pages could not be reserved.
        """
        self._alive()
        huge = file is not None or flags & MAP_HUGETLB != 0
        if flags & ~(_HUGETLB_FLAGS if huge else MAP_FIXED | MAP_UNINITIALIZED):
            raise MmError(f"mmap: -EINVAL: unknown flags {flags:#x}")
        uninitialized = flags & MAP_UNINITIALIZED != 0
        size = PAGE_SIZE
        if huge:
            size_log = flags >> MAP_HUGE_SHIFT & MAP_HUGE_MASK
            uninitialized = size_log == 1
            order = HPAGE_PMD_ORDER if size_log < 2 else size_log - PAGE_SHIFT
            size = file.page_size if file is not None else PAGE_SIZE << self._mm.hugetlb.valid_order(order)
        length = -(-length // size) * size
        if length <= 0 or length > TASK_SIZE:
            raise MmError(f"mmap: -EINVAL: length {length} is not between one page and 2^47")
        if flags & MAP_FIXED:
            if addr < 0 or addr % size or addr + length > TASK_SIZE:
                raise MmError(f"mmap: -EINVAL: address {addr:#x} is unaligned or outside of user space")
            if any(vma[0].vm_start < addr + length and addr < vma[0].vm_end for vma in self._vmas):
                raise MmError(f"mmap: -EEXIST: [{addr:#x}, {addr + length:#x}) is mapped already")
        else:
            addr = self._unmapped_area(length, size)
        vm_flags = VM_READ | VM_WRITE | (VM_UNINITIALIZED if uninitialized else 0)
        vma = new_vma(addr, addr + length, vm_flags, self._pgd, self._mm_id, self._node)
        vma[0].policy, vma[0].nodemask = self._policy
        if huge:
            vma[0].vm_flags |= (VM_SHARED if flags & MAP_SHARED else 0) | (
                VM_NORESERVE if flags & MAP_NORESERVE else 0
            )
            if file is None:
                file = self._mm.hugetlb.anon_file(length, size)
            self._mm.hugetlb.mmap(vma, file, offset, self._vmas_of, cpu=self._cpu)
        self._vmas.append(vma)
        self._vmas.sort(key=lambda vma: int(vma[0].vm_start))
        return addr

    def munmap(self, addr: int, length: int) -> None:
        """Unmap `[addr, addr + length)` and free its pages; unmapped holes are no error.

        Raises:
            MmError: -EINVAL for an unaligned address or an empty range, or for a part of a
                hugetlb page.
            OutOfMemory: a huge page had to be split and there was no page for its table.
        """
        start, end = self._range(addr, length, "munmap")
        self._split_to(start, end)
        try:
            for low, high, huge in self._stretches(start, end):
                self._zap(low, high)
                self._vmas = [vma for vma in self._vmas if not low <= vma[0].vm_start < high]
                if huge is not None:
                    self._mm.hugetlb.close(huge)
        finally:
            # Also when a later stretch failed: nothing would look at this part again.
            free_empty_tables(self._mem, self._pgd, start, end, self._cpu)

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """Advise on `[addr, addr + length)` as Linux's call of the same name.

        `MADV_POPULATE_WRITE` faults the range in for writing, `MADV_DONTNEED` drops its
        pages, `MADV_PAGEOUT` swaps them out as far as there is swap, `MADV_HUGEPAGE` and
        `MADV_NOHUGEPAGE` permit or forbid huge pages.

        Raises:
            BadAddress: -ENOMEM, a part of the range is not mapped.
            MmError: -EINVAL for an unaligned address or an unknown advice, or for swapping a
                hugetlb mapping out.
            OutOfMemory: -ENOMEM from a populate.
        """
        start, end = self._range(addr, length, "madvise")
        if advice not in _ADVICES:
            raise MmError(f"madvise: -EINVAL: unknown advice {advice}")
        self._require_mapped(start, end)
        if advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
            gained, lost = (
                (VM_HUGEPAGE, VM_NOHUGEPAGE) if advice == MADV_HUGEPAGE else (VM_NOHUGEPAGE, VM_HUGEPAGE)
            )
            for vma in self._split_to(start, end):
                vma[0].vm_flags = (vma[0].vm_flags & ~lost) | gained
        elif advice == MADV_POPULATE_WRITE:
            self._populate(start, end, write=True)
        elif advice == MADV_PAGEOUT:
            if any(vma[0].hstate >= 0 for vma, _, _ in self._pieces(start, end)):
                raise MmError("madvise: -EINVAL: hugetlb pages cannot be swapped out")
            pageout_page_range(self._mem, self._pgd, start, end, self._node, self._cpu)
        else:
            for vma, low, _ in self._pieces(start, end):
                self._require_whole_pages(vma, low)
            self._zap(start, end)

    def mbind(self, addr: int, length: int, mode: int, nodemask: int = 0) -> None:
        """Choose the nodes of pages that are faulted in from now on (kernel: `mbind`).

        Pages that are there stay where they are, as without MPOL_MF_MOVE.

        Args:
            addr: a page boundary.
            length: rounded up to whole pages.
            mode: `mempolicy.MPOL_*`.
            nodemask: nodes, a bit each.

        Raises:
            BadAddress: -EFAULT, a part of the range is not mapped.
            MmError: -EINVAL for an unaligned address or a policy without sense.
        """
        start, end = self._range(addr, length, "mbind")
        check_policy(self._mem, mode, nodemask)
        self._require_mapped(start, end)
        for vma in self._split_to(start, end):
            vma[0].policy, vma[0].nodemask = mode, nodemask

    def set_mempolicy(self, mode: int, nodemask: int = 0) -> None:
        """Choose the policy of mappings made from now on (kernel: `set_mempolicy`).

        Linux asks the task at each fault in a mapping without a policy of its own. Here the
        mapping takes the policy along when it is made, and a later call leaves it alone.

        Raises:
            MmError: -EINVAL for a policy without sense.
        """
        self._alive()
        check_policy(self._mem, mode, nodemask)
        self._policy = mode, nodemask

    def touch(self, addr: int, length: int) -> None:
        """Write one byte to each page of a range of whole pages."""
        start, end = self._range(addr, length, "touch")
        self._require_mapped(start, end)
        self._populate(start, end, write=True)
        touch_range(self._mem, self._pgd, self._mm.ram_bytes, start, end)

    def fill(self, addr: int, length: int, byte: int) -> None:
        """Write `byte` to a range of whole pages."""
        start, end = self._range(addr, length, "fill")
        self._require_mapped(start, end)
        self._populate(start, end, write=True)
        fill_range(self._mem, self._pgd, start, end, byte & 0xFF)

    def read(self, addr: int, length: int) -> bytes:
        """Read bytes through the page tables.

        Raises:
            BadAddress: a byte of the range is not mapped.
        """
        data = np.empty(length, dtype=np.uint8)
        self._copy(addr, data, write=False)
        return data.tobytes()

    def write(self, addr: int, data: bytes) -> None:
        """Write bytes through the page tables.

        Raises:
            BadAddress: a byte of the range is not mapped; nothing is written then.
            OutOfMemory: a page could not be faulted in; nothing is written then.
        """
        self._copy(addr, np.frombuffer(data, dtype=np.uint8).copy(), write=True)

    def find_nonzero(self, addr: int, length: int) -> int | None:
        """Return the first mapped address of a range whose word is not zero, or None.

        Looks through the page tables and faults nothing in.
        """
        start, end = self._range(addr, length, "find_nonzero")
        found = int(find_nonzero(self._mem, self._pgd, start, end))
        return None if found < 0 else found

    def _alive(self) -> None:
        if self._pgd == NO_PAGE:
            raise MmError("the process has exited")

    def _range(self, addr: int, length: int, call: str) -> tuple[int, int]:
        self._alive()
        length = -(-length // PAGE_SIZE) * PAGE_SIZE
        if addr % PAGE_SIZE or addr < 0 or length <= 0 or addr + length > TASK_SIZE:
            raise MmError(f"{call}: -EINVAL: [{addr:#x}, +{length:#x}) is unaligned, empty or not user space")
        return addr, addr + length

    def _vmas_of(self, number: int) -> list[Any]:
        return [vma for vma in self._vmas if vma[0].file == number]

    def _unmapped_area(self, length: int, size: int) -> int:
        align = max(size, PMD_SIZE if length >= PMD_SIZE else PAGE_SIZE)
        addr = MMAP_BASE
        for vma in self._vmas:
            if vma[0].vm_end <= addr:
                continue
            if addr + length <= vma[0].vm_start:
                break
            addr = -(-int(vma[0].vm_end) // align) * align
        if addr + length > TASK_SIZE:
            raise MmError("mmap: -ENOMEM: no room in the address space")
        return addr

    def _pieces(self, start: int, end: int) -> Iterator[tuple[Any, int, int]]:
        for vma in self._vmas:
            low, high = max(start, int(vma[0].vm_start)), min(end, int(vma[0].vm_end))
            if low < high:
                yield vma, low, high

    def _stretches(self, start: int, end: int) -> list[tuple[int, int, Any]]:
        # Neighbouring mappings as one: a huge page under two of them that goes whole is
        # not split first, which takes a page that may not be there. A hugetlb mapping stands
        # for itself and comes with its record.
        stretches: list[tuple[int, int, Any]] = []
        for vma, low, high in self._pieces(start, end):
            huge = vma if vma[0].hstate >= 0 else None
            if huge is None and stretches and stretches[-1][1] == low and stretches[-1][2] is None:
                low = stretches.pop()[0]
            stretches.append((low, high, huge))
        return stretches

    def _require_whole_pages(self, vma: Any, *addresses: int) -> None:
        size = self._mm.hugetlb.page_size(vma)
        if any(at % size for at in addresses):
            raise MmError(f"-EINVAL: a huge page of {size} bytes cannot be cut")

    def _require_mapped(self, start: int, end: int) -> None:
        at = start
        for _, low, high in self._pieces(start, end):
            if low > at:
                break
            at = high
        if at < end:
            raise BadAddress(f"address {at:#x} is not mapped")

    def _split_to(self, start: int, end: int) -> list[Any]:
        """Cut mappings at the range's ends; return those inside (kernel: `split_vma`)."""
        inside = []
        pieces = list(self._pieces(start, end))
        for vma, low, high in pieces:
            self._require_whole_pages(vma, low, high)
        for vma, low, high in pieces:
            for at in (low, high):
                if vma[0].vm_start < at < vma[0].vm_end:
                    self._cut(vma, at, keep_upper=at == low)
            inside.append(vma)
        return inside

    def _cut(self, vma: Any, at: int, *, keep_upper: bool) -> None:
        # `vma` keeps the side that the caller works on; the other side gets its own record.
        other = vma.copy()
        lower, upper = (other, vma) if keep_upper else (vma, other)
        upper[0].vm_pgoff += (at - int(upper[0].vm_start)) >> PAGE_SHIFT
        lower[0].vm_end = at
        upper[0].vm_start = at
        self._vmas.append(other)
        self._vmas.sort(key=lambda entry: int(entry[0].vm_start))

    def _zap(self, start: int, end: int) -> None:
        self._mm.memory_failure.forget(self._mm_id, start, end)
        for low, high, huge in self._stretches(start, end):
            if huge is not None:
                self._mm.hugetlb.unmap(huge, low, high, cpu=self._cpu)
                continue
            while not zap_page_range(self._mem, self._pgd, low, high, self._node, self._cpu):
                if not self._mm.out_of_memory():
                    raise OutOfMemory("no page for the table that splitting a huge page needs")

    def _populate(self, start: int, end: int, *, write: bool) -> None:
        self._mm.memory_failure.check(self._mm_id, start, end)
        for vma, low, high in list(self._pieces(start, end)):
            if vma[0].hstate >= 0:
                self._mm.hugetlb.populate(vma, low, high, write=write, cpu=self._cpu)
                continue
            at = low
            while at < high:
                at = int(populate_range(self._mem, vma, at, high, write, self._cpu))
                if at < high:
                    self._no_page_for(at)

    def _no_page_for(self, addr: int) -> None:
        # A cgroup's limit is not the guest's: no OOM notifier can help with it.
        mm = self._mem.mms[self._mm_id - 1]
        if mm.memcg_in_oom:
            memcg, mm.memcg_in_oom = int(mm.memcg_in_oom) - 1, 0
            raise MemcgOutOfMemory(f"no page for address {addr:#x}: {self._mm.memcg.describe_limit(memcg)}")
        if not self._mm.out_of_memory():
            raise OutOfMemory(f"no page for address {addr:#x}")

    def _copy(self, addr: int, data: NDArray[np.uint8], *, write: bool) -> None:
        self._alive()
        if addr < 0 or addr + len(data) > TASK_SIZE:
            raise BadAddress(f"address {addr:#x} is not in user space")
        if not len(data):
            return
        start, end = addr // PAGE_SIZE * PAGE_SIZE, -(-(addr + len(data)) // PAGE_SIZE) * PAGE_SIZE
        self._require_mapped(start, end)
        self._populate(start, end, write=write)
        copy_user(self._mem, self._pgd, self._mm.ram_bytes, addr, data, write)
