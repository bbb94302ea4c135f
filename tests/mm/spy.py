# SPDX-License-Identifier: GPL-2.0-only
"""Which allocations user pages take, seen from inside.

Compiled code cannot be spied on, so the calls run in an interpreter without the compiler.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

_PRELUDE = """
from hostzero.mm import prep
from hostzero.mm.gfp import __GFP_ZERO
from tests.mm.guest import booted

seen = []
hook, zero = prep.post_alloc_hook, prep.folio_zero_user

def spy_hook(mem, pfn, order, gfp, user_addr, zeroed):
    if user_addr != -1:
        seen.append(("hook", int(order), int(user_addr), bool(gfp & __GFP_ZERO)))
    hook(mem, pfn, order, gfp, user_addr, zeroed)

def spy_zero(mem, pfn, order, user_addr):
    seen.append(("zero", int(order), int(user_addr), True))
    zero(mem, pfn, order, user_addr)

def start():
    prep.post_alloc_hook, prep.folio_zero_user = spy_hook, spy_zero
"""

Seen = tuple[str, int, int, bool]
"""Where ("hook": `post_alloc_hook`, "zero": `folio_zero_user`), order, user address, `__GFP_ZERO`."""


def spy(script: str) -> list[Seen]:
    """Run calls on a guest (`booted` is there); return the user allocations after `start()`."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", f"{_PRELUDE}\n{script}\nprint(seen)"],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    seen: list[Seen] = ast.literal_eval(child.stdout)
    return seen
