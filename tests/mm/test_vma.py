# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from hostzero.mm.mmap import MMAP_BASE
from hostzero.mm.pgtable import TASK_SIZE
from hostzero.mm.vma import (
    VM_HUGEPAGE,
    VM_NOHUGEPAGE,
    VM_READ,
    VM_UNINITIALIZED,
    VM_WRITE,
    VMA_DTYPE,
    new_vma,
)


def test_a_record_says_what_it_was_made_of() -> None:
    vma = new_vma(MMAP_BASE, TASK_SIZE, VM_READ | VM_WRITE | VM_UNINITIALIZED, 77, 3, 1)
    assert len(vma) == 1
    assert (int(vma[0].vm_start), int(vma[0].vm_end)) == (MMAP_BASE, TASK_SIZE)
    assert int(vma[0].vm_flags) == VM_READ | VM_WRITE | VM_UNINITIALIZED
    assert (int(vma[0].pgd), int(vma[0].mm_id), int(vma[0].node)) == (77, 3, 1)


def test_records_are_independent() -> None:
    """Splitting a mapping copies its record; a change to one side must not reach the other."""
    vma = new_vma(0, 1 << 21, VM_READ, 1, 1, 0)
    other = vma.copy()
    other[0].vm_end = 4096
    other[0].vm_flags |= VM_HUGEPAGE
    assert int(vma[0].vm_end) == 1 << 21
    assert int(vma[0].vm_flags) == VM_READ


def test_flags_are_distinct_bits() -> None:
    flags = (VM_READ, VM_WRITE, VM_HUGEPAGE, VM_NOHUGEPAGE, VM_UNINITIALIZED)
    assert all(flag.bit_count() == 1 for flag in flags)
    assert len(set(flags)) == len(flags)


def test_every_field_holds_any_user_address() -> None:
    """64-bit fields: compiled code must not wrap where it shifts or adds."""
    assert {VMA_DTYPE[name].itemsize for name in VMA_DTYPE.names or ()} == {8}
