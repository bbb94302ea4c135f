# SPDX-License-Identifier: GPL-2.0-only
"""Sub-pages in the balloon against a plain set of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostzero.device.geometry import RamSpan
from hostzero.device.partial_pages import PartialPages
from hostzero.device.pfn_runs import PfnRun

# Host pages of four begin at 1, 5, ..., 25; the one at 1 and the one at 25 are cut by the span.
SPAN = RamSpan(2, 28, sub_pages=4, phase=1)
RUNS = st.builds(
    lambda first, pages: PfnRun(first, min(pages, SPAN.end - first)),
    st.integers(SPAN.first, SPAN.end - 1),
    st.integers(1, 12),
)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove"]), RUNS), max_size=30)


@given(STEPS)
def test_complete_are_the_host_pages_whose_sub_pages_are_all_in(steps: list[tuple[str, PfnRun]]) -> None:
    partial = PartialPages()
    balloon: set[int] = set()
    for step, run in steps:
        pages = set(range(run.first, run.end))
        if step == "remove":
            balloon -= pages
            partial.remove(SPAN, run)
        else:
            balloon |= pages
            touched = {SPAN.host_page(pfn) for pfn in pages}
            complete = [page for page in sorted(touched) if set(range(page, page + 4)) <= balloon]
            assert partial.add(SPAN, run) == complete
        # Only whole host pages are kept; the cut ones at either end never are.
        kept = {pfn for pfn in balloon if SPAN.holds_host_page(SPAN.host_page(pfn))}
        assert {pfn for pfn in range(2, 28) if partial.inflated(SPAN, pfn)} == kept
        assert len(partial) == len({SPAN.host_page(pfn) for pfn in kept})


def test_clear_forgets_everything() -> None:
    partial = PartialPages()
    partial.add(SPAN, PfnRun(5, 3))
    partial.clear()
    assert len(partial) == 0
    assert partial.add(SPAN, PfnRun(8, 1)) == []


def test_never_more_entries_than_host_pages_in_ram() -> None:
    partial = PartialPages()
    for first in range(SPAN.first, SPAN.end):
        partial.add(SPAN, PfnRun(first, SPAN.end - first))
    assert len(partial) == len([5, 9, 13, 17, 21])
