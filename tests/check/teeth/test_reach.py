# SPDX-License-Identifier: GPL-2.0-only
"""What a search can run: found in the source, and true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hostzero
from hostzero.check.run import SEARCHES
from hostzero.check.teeth.reach import imported, reach

PACKAGE = Path(hostzero.__file__).parent


def test_imports_are_found_wherever_they_are_but_for_type_checkers() -> None:
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def g():\n    from h import i\n"
    )
    assert set(imported(source)) == {"a.b", "c", "c.d", "f", "h", "h.i"}


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_is_left_out_that_a_search_imports(name: str) -> None:
    module = SEARCHES[name].module
    code = (
        f"import sys, json, {module}\n"
        "loaded = [module.__file__ for name, module in sys.modules.items() if name.startswith('hostzero')]\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(file).relative_to(PACKAGE).as_posix() for file in json.loads(done.stdout)}
    assert loaded <= reach(PACKAGE, module)


def test_the_allocator_runs_no_device_and_the_machine_does() -> None:
    assert "device/inflate.py" not in reach(PACKAGE, SEARCHES["allocator"].module)
    assert "mm/buddy.py" in reach(PACKAGE, SEARCHES["allocator"].module)
    for module in ("device/inflate.py", "driver/inflate.py", "mm/buddy.py", "ram/backing.py"):
        assert module in reach(PACKAGE, SEARCHES["machine"].module)
