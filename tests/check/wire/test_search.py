# SPDX-License-Identifier: GPL-2.0-only
"""The search "wire": it finds what is planted, makes it short, and finds it again from the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hostzero.check.recording import Recording
from hostzero.check.search import Limits
from hostzero.check.violation import Violation
from hostzero.check.wire.search import WireSearch, run_steps
from hostzero.device.inflate import DeflateQueue
from hostzero.driver.config_space import ConfigSpace
from hostzero.errors import UsageError


def quiet(operations: int, states: int | None, rows: Counter[str], note: str = "") -> None:
    """Hear of progress."""
    assert operations > 0
    assert states is None
    assert not rows
    assert "episodes" in note


def test_a_sound_tree_gives_notes_and_no_recording() -> None:
    search = WireSearch()
    search.prepare()
    findings = search.run(Limits(seconds=1.0), 1, quiet)
    assert findings.recording is None
    assert findings.operations > 0
    assert any("against the device" in note for note in findings.notes)
    assert any("against the driver" in note for note in findings.notes)


def test_a_fault_of_the_device_is_found_shrunk_and_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deflate = DeflateQueue.handle
    monkeypatch.setattr(
        DeflateQueue, "handle", lambda queue, chain: deflate(queue, chain) + min(chain.writable_len, 1)
    )
    search = WireSearch()
    findings = search.run(Limits(seconds=60.0), 1, quiet)
    recording = findings.recording
    assert recording is not None
    assert recording.setup["side"] == "device"
    assert recording.violation.what == "a used length for a request into which nothing is written"
    assert len(recording.steps) <= 4
    recording.save(tmp_path / "found.json")
    again = Recording.load(tmp_path / "found.json")
    found = search.replay(again)
    assert found is not None
    assert found.what == recording.violation.what
    monkeypatch.undo()
    assert search.replay(again) is None


def test_a_fault_of_the_driver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(space: ConfigSpace, offset: int, name: str) -> int:
        data = space._transport.read_config(offset, 4)
        return {4: int.from_bytes(data, "little")}[len(data)] * bool(name)

    monkeypatch.setattr(ConfigSpace, "_read", cut)
    steps = [["probe", 0x1_0000_00E2], ["fault", 2, 3], ["target", 5]]
    count, found = run_steps({"side": "driver", "guest": "plain"}, steps)
    assert count == 3
    assert found is not None
    assert found.what == "KeyError comes out of the driver at a configuration change"


@pytest.mark.parametrize(
    ("setup", "steps"),
    [
        ({"side": "moon"}, []),
        ({"side": "driver", "guest": "none"}, []),
        ({"side": "device"}, []),
        ({"side": "driver", "guest": "plain"}, [["fly"]]),
        ({"side": "driver", "guest": "plain"}, [["lie", 1]]),
    ],
)
def test_a_recording_of_something_else_is_a_usage_error(
    setup: dict[str, object], steps: list[list[object]]
) -> None:
    recording = Recording("wire", setup, tuple(steps), Violation("rot", "x"))
    with pytest.raises(UsageError, match="none of the search 'wire'"):
        WireSearch().replay(recording)
