# SPDX-License-Identifier: GPL-2.0-only
"""Which node a page of a mapping comes from (kernel: `mm/mempolicy.c`; series: patches 1 and 6).

A policy is two fields of the mapping's record, `policy` and `nodemask`. Patch 1 is
`interleave_index`: the address that reaches the allocator is the raw fault address, so
the index must not depend on where in a block it lies.

`MPOL_BIND` needs more than a node: no page may come from outside the mask. For each pair
of a mask and a nearest node there is a row of `Memory.zonelists` that holds those zones
only, as old kernels had (`bind_zonelist`); `vma_zonelist` names the row. Linux passes a
mask beside the list instead, which would be one more argument in the hot path.
"""

from __future__ import annotations

from typing import Final

from hostzero.errors import MmError
from hostzero.jit import compiled, inline
from hostzero.mm.mmzone import Memory
from hostzero.units import PAGE_SHIFT

MPOL_DEFAULT: Final = 0
MPOL_PREFERRED: Final = 1
MPOL_BIND: Final = 2
MPOL_INTERLEAVE: Final = 3


@compiled
def interleave_index(vma: object, addr: int, order: int) -> int:
    """Return which turn of the interleaving the block of `order` around `addr` has (patch 1).

    The index depends on the naturally aligned block alone, and the next block has the next
    index: `addr` and `vm_start` are each cut down to blocks before they are subtracted. Linux
    7.2 subtracts first, so in a mapping that does not start on a block boundary one block has
    two indices and the faulting page decides between them.
    """
    v = vma[0]  # type: ignore[index]
    shift = PAGE_SHIFT + order
    return (v.vm_pgoff >> order) + (addr >> shift) - (v.vm_start >> shift)


@compiled
def nth_node(nodemask: int, n: int) -> int:
    """Return the `n`-th node of a mask, counted around (kernel: `interleave_nid`)."""
    weight = 0
    mask = nodemask
    while mask != 0:
        weight += mask & 1
        mask >>= 1
    left = n % weight
    node = 0
    while left > 0 or ((nodemask >> node) & 1) == 0:
        left -= (nodemask >> node) & 1
        node += 1
    return node


@compiled
def nearest_node(mem: Memory, nodemask: int, node: int) -> int:
    """Return the node of a mask that `node`'s own zonelist reaches first."""
    count = mem.vm[0].nr_nodes
    for step in range(count):
        candidate = (node + step) % count
        if ((nodemask >> candidate) & 1) != 0:
            return candidate
    return node


@compiled
def vma_node(mem: Memory, vma: object, addr: int, order: int) -> int:
    """Return the node that a block of `order` at `addr` should come from.

    Source: `get_vma_policy`, `policy_nodemask`. PREFERRED takes the first node of its mask (the
    local one for an empty mask), BIND the nearest of its mask, INTERLEAVE takes turns. The
    nodes beyond it are `vma_zonelist`'s business.
    """
    v = vma[0]  # type: ignore[index]
    if v.policy == MPOL_DEFAULT or v.nodemask == 0:
        return v.node
    if v.policy == MPOL_INTERLEAVE:
        return nth_node(v.nodemask, interleave_index(vma, addr, order))
    if v.policy == MPOL_PREFERRED:
        return nth_node(v.nodemask, 0)
    return nearest_node(mem, v.nodemask, v.node)


@compiled
def policy_zonelist(mem: Memory, vma: object, addr: int, order: int) -> int:
    """Return what `vma_zonelist` does, for a mapping that has a policy."""
    v = vma[0]  # type: ignore[index]
    node = vma_node(mem, vma, addr, order)
    if v.policy == MPOL_BIND:
        return v.nodemask * mem.vm[0].nr_nodes + node
    return node


@inline
def vma_zonelist(mem: Memory, vma: object, addr: int, order: int) -> int:
    """Return the row of `Memory.zonelists` that a block of a mapping is allocated from.

    It is what `__alloc_frozen_pages` takes as its node. A row below `nr_nodes` is that node's,
    with every zone behind it; a higher one holds the zones of a BIND mask alone.
    """
    v = vma[0]  # type: ignore[index]
    if v.policy == MPOL_DEFAULT:
        return v.node
    return policy_zonelist(mem, vma, addr, order)


def check_policy(mem: Memory, mode: int, nodemask: int) -> None:
    """Refuse a policy that makes no sense (kernel: `mpol_new`, `mpol_set_nodemask`).

    Raises:
        MmError: -EINVAL for an unknown mode, a node that does not exist or has no memory,
            nodes given to MPOL_DEFAULT, or none given to MPOL_BIND or MPOL_INTERLEAVE.
    """
    if mode not in (MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE):
        raise MmError(f"mempolicy: -EINVAL: unknown policy {mode}")
    with_memory = sum(1 << node for node in {int(node) for node in mem.zone.node})
    if nodemask & ~with_memory:
        raise MmError(f"mempolicy: -EINVAL: nodes {nodemask:#x} are not all among {with_memory:#x}")
    if mode == MPOL_DEFAULT and nodemask:
        raise MmError("mempolicy: -EINVAL: MPOL_DEFAULT takes no nodes")
    if mode in (MPOL_BIND, MPOL_INTERLEAVE) and not nodemask:
        raise MmError("mempolicy: -EINVAL: MPOL_BIND and MPOL_INTERLEAVE need nodes")
