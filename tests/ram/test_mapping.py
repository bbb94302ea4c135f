# SPDX-License-Identifier: GPL-2.0-only
"""The aligned window: where it lies, what it shares, and when it goes."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hostzero.ram.mapping import Mapping
from hostzero.units import PAGE_SIZE, PMD_SIZE
from tests.ram.host import mapped

pages = st.integers(0, 600).map(lambda count: count * PAGE_SIZE)


@settings(max_examples=50)
@given(size=pages, lead=pages, tail=pages, skew=pages, shift=st.sampled_from([21, 22, 30]))
def test_the_window_is_aligned_writable_and_freed(
    size: int, lead: int, tail: int, skew: int, shift: int
) -> None:
    size += PAGE_SIZE
    window = Mapping(size, alignment=1 << shift, skew=skew % (1 << shift), lead=lead, tail=tail)
    assert (window.base - lead - skew) % (1 << shift) == 0
    view = window.window()
    assert len(view) == size
    view[0] = view[size - 1] = 7
    array = window.array(np.uint8)
    assert array.size == size
    assert array[0] == array[-1] == 7
    del array
    view.release()
    window.release()
    assert not mapped(window.base)


def test_a_file_lies_under_the_whole_span() -> None:
    """The window starts `lead` bytes into what is mapped of the file."""
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * PMD_SIZE)
    window = Mapping(PMD_SIZE, lead=3 * PAGE_SIZE, tail=PAGE_SIZE, skew=PAGE_SIZE)
    window.map_file(fd, PAGE_SIZE, reserve=False)
    view = window.window()
    view[:5] = b"start"
    view[-3:] = b"end"
    assert os.pread(fd, 5, 4 * PAGE_SIZE) == b"start"
    assert os.pread(fd, 3, 4 * PAGE_SIZE + PMD_SIZE - 3) == b"end"
    os.close(fd)
    view.release()
    window.release()


def test_a_view_keeps_the_memory_after_release() -> None:
    window = Mapping(PMD_SIZE)
    view = window.window()
    base = window.base
    window.release()
    view[9] = 9
    assert view[9] == 9
    assert mapped(base)
    view.release()
    assert not mapped(base)
